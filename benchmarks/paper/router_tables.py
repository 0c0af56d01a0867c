"""Tables of ``benchmarks.paper.router_search``: mean rank, wins, gaps over problems; suggestion cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy.stats import rankdata  # type: ignore[import-untyped]

OURS = "bits"


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kind, budget and method, over the problems (task, seed) that it was run on.

    ``rank``: mean over problems of the rank of the final training loss among the methods (1 is best, ties
    share); ``loss``: mean of that loss, ``ours_loss``: that of ``bits`` on the same problems; ``ours``: on
    how many of them ``bits`` was better, equal, worse. ``bo`` is ranked where it was run; the others' ranks
    are among themselves, so that they compare over all problems.
    """
    cells: dict[tuple[str, int], dict[tuple[str, int], dict[str, dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        if row["cell"] != "exhaustive":
            method, budget = row["cell"].rsplit(" ", 1)
            cells[row["kind"], int(budget)][row["task"], row["seed"]][method] = row
    found = []
    for (kind, budget), problems in sorted(cells.items(), reverse=True):
        methods = list(dict.fromkeys(m for cell in problems.values() for m in cell))
        ranks: dict[str, list[float]] = defaultdict(list)
        for cell in problems.values():
            names = [m for m in methods if m in cell and m != "bo"]
            losses = [cell[m]["loss"] for m in names]
            for name, rank in zip(names, rankdata(losses), strict=True):
                ranks[name].append(float(rank))
            if "bo" in cell:
                ranks["bo"].append(float(rankdata([*losses, cell["bo"]["loss"]])[-1]))
        for method in methods:
            own = [cell for cell in problems.values() if method in cell]
            against = [cell for cell in own if OURS in cell]
            signs = [np.sign(c[method]["loss"] - c[OURS]["loss"]) for c in against]
            found.append(
                {
                    "kind": kind,
                    "budget": budget,
                    "method": method,
                    "problems": len(own),
                    "rank": float(np.mean(ranks[method])),
                    "loss": float(np.mean([c[method]["loss"] for c in own])),
                    "ours_loss": float(np.mean([c[OURS]["loss"] for c in against])) if against else None,
                    "dev": float(np.mean([c[method]["dev_score"] for c in own])),
                    "ours": [sum(s == v for s in signs) for v in (1, 0, -1)],
                    "seconds": float(np.mean([c[method]["seconds"] for c in own])),
                }
            )
    return found


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of :func:`summary`, best mean rank first."""
    lines = []
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in summary(rows):
        groups[row["kind"], row["budget"]].append(row)
    for (kind, budget), members in groups.items():
        lines += [
            f"\n{kind}, {budget} evaluations\n",
            "| method | problems | mean rank | train loss | bits | dev % | bits better, equal, worse |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in sorted(members, key=lambda r: r["rank"]):
            ours = "-" if row["ours_loss"] is None else f"{row['ours_loss']:.4f}"
            lines.append(
                f"| {row['method']} | {row['problems']} | {row['rank']:.2f} | {row['loss']:.4f} | {ours}"
                f" | {100 * row['dev']:.1f} | {' / '.join(map(str, row['ours']))} |"
            )
    best = [r for r in rows if r["cell"] == "exhaustive"]
    if best:
        loss, dev = (float(np.mean([r[k] for r in best])) for k in ("loss", "dev_score"))
        lines.append(f"\nshallow, all 256 routers: train loss {loss:.4f}, dev {100 * dev:.1f} %")
    return "\n".join(lines)


def task_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: training loss by task, mean and deviation (n - 1) over seeds, for each kind and budget."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["kind"], row["cell"]][row["task"]].append(row["loss"])
    lines = [
        f"\n| train loss over seeds | {' | '.join(tasks)} |",
        "| --- |" + " --- |" * len(tasks),
    ]
    for (kind, cell), losses in sorted(found.items()):
        texts = [_over_seeds(losses[task]) for task in tasks]
        lines.append(f"| {kind} {cell} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _over_seeds(losses: Sequence[float]) -> str:
    if not losses:
        return "-"
    deviation = stdev(losses) if len(losses) > 1 else 0.0
    return f"{mean(losses):.4f} ± {deviation:.4f} ({len(losses)})"


def cost_table(costs: Sequence[dict[str, Any]]) -> str:
    """Markdown: CPU seconds of suggestions at 192 dimensions."""
    lines = [
        "\nCost of suggestions: 192 dimensions, 100 iterations, CPU time\n",
        "| method | s in all | ms each |",
        "| --- | ---: | ---: |",
    ]
    for cost in costs:
        lines.append(f"| {cost['method']} | {cost['seconds']:.4f} | {1e3 * cost['each']:.3f} |")
    return "\n".join(lines)

"""Table 4 of the paper: its numbers, and how `benchmarks.speed.table4` puts ours beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TASKS = ["thucnews", "bq", "tnews", "lcqmc"]
KINDS = ["deep", "shallow"]
PAPER = {  # Table 4: minutes, only stage I and two-stage
    "shallow": {"thucnews": (1.26, 14.46), "bq": (1.10, 7.74), "tnews": (1.61, 25.20), "lcqmc": (1.11, 6.70)},
    "deep": {"thucnews": (2.62, 7.88), "bq": (2.90, 5.57), "tnews": (8.20, 17.44), "lcqmc": (2.28, 4.51)},
}
PUBLISHED = {"shallow": 7800, "deep": 2880}  # stage II evaluations that the paper's minutes stand for
STATED = {"shallow": 7800, "deep": 7900}
RIVALS = ("plain", "A", "B", "C")  # A, B and C: of deep prompts, where they were measured
WHOSE = ("paper", *RIVALS, "ours")


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: a block a kind, a column a task."""
    lines = []
    for kind in KINDS:
        row = {c["task"]: c for c in cells if c["kind"] == kind}
        tasks = [task for task in TASKS if task in row]
        if not tasks:
            continue
        one = row[tasks[0]]
        theirs = "float32" if one["device"] == "cpu" else "the same precision"
        lines += [
            f"{kind} prompts, {one['n_layers']} layers, {one['device']}; ours: {one['runtime']} in "
            f"{one['precision']}, the others in {theirs}; paper: an RTX 3090",
            "",
            "| " + " | ".join(["", "whose", *tasks]) + " |",
            "| --- | --- |" + " ---: |" * len(tasks),
        ]
        lines.append(
            "| examples, mean tokens | |"
            + "".join(f" {row[t]['n_examples']} x {row[t]['mean_tokens']:.0f} |" for t in tasks)
        )
        metrics = [
            ("ms an evaluation, stage II", "evaluation_ms"),
            ("minutes, only stage I", "stage1_minutes"),
            (f"minutes, two-stage ({PUBLISHED[kind]:,} evaluations in stage II)", "two_stage_minutes"),
        ]
        if STATED[kind] != PUBLISHED[kind]:
            metrics.append((f"minutes, two-stage ({STATED[kind]:,}, as the paper states)", "stated_minutes"))
        for title, name in metrics:
            for whose in WHOSE:
                found = [row[t].get(whose, {}) for t in tasks]
                if all(name not in x for x in found):
                    continue
                marks = [" *" if x.get("how") == "extrapolated" else "" for x in found]
                texts = [f" {_number(x.get(name))}{mark} |" for x, mark in zip(found, marks, strict=True)]
                lines.append(f"| {title} | {whose} |" + "".join(texts))
                title = ""
            if "bo" in row and name == "stage1_minutes":
                lines.append(_with_bo(row["bo"], [row[t]["ours"][name] for t in tasks]))
        for rival in RIVALS:
            if any(rival in row[t] for t in tasks):
                lines.append(
                    f"| {rival} / ours, an evaluation | |" + "".join(_ratio(row[t], rival) for t in tasks)
                )
        lines.append("")
    lines.append("\\* extrapolated from timed iterations")
    return "\n".join(lines)


def _with_bo(bo: dict[str, Any], stage1_minutes: Sequence[float]) -> str:
    """Stage I with the suggestions of Bayesian optimisation on top of what stage I took with ours."""
    mark = " *" if bo["how"] == "extrapolated" else ""
    minutes = bo["suggest_s"] / 60
    texts = [f" {_number(x + minutes)}{mark} |" for x in stage1_minutes]
    return f"| | ours, router search `bo` ({_number(minutes)} of it suggestions) |" + "".join(texts)


def _ratio(cell: dict[str, Any], rival: str) -> str:
    if rival not in cell:
        return " |"
    return f" {cell[rival]['evaluation_ms'] / cell['ours']['evaluation_ms']:.2f} |"


def _number(x: float | None) -> str:
    if x is None:
        return ""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"

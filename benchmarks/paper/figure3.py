"""Figure 3 of the paper: both stages of tuning shallow MP2, by gradient and black-box, on dev.

Dev score over epochs or iterations, mean and standard deviation over the seeds, the end of stage I as a
green dashed line: BQ (unseen data) and LCQMC (unseen task). Black-box tuning is scored on dev every 20
iterations, in stage I too, and dev selects among all of these; elsewhere it is only at stage I's end. The
paper has a picture only, without numbers.

    python -m benchmarks.paper figure3 --data DIR [--backbone B] [--prompts SHALLOW] [--iters N] [--epochs N]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.paper.cell_code import code_line, codes, made_by
from benchmarks.paper.cells import Cell, read_cells
from benchmarks.paper.methods import Lab
from benchmarks.paper.options import choose, compute, deadline, parser_of, seeds_of, settings_of
from benchmarks.paper.state import check_failed, nothing_yet, state_of
from mp2.files import whole_file, write_json

TASKS = ("bq", "lcqmc")
DEV_EVERY = 20
PARADIGMS = {"gradient-shallow": ("gradient descent", "epoch"), "shallow": ("black-box tuning", "iteration")}


def curves(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a paradigm and task: dev score in per cent at every iteration that any seed was scored at.

    Between two of its scores a seed keeps the former: that is the prompt which it had.
    """
    rows = []
    for method in PARADIGMS:
        for task in dict.fromkeys(cell["task"] for cell in cells):
            own = [c for c in cells if (c["method"], c["task"]) == (method, task) and _scored(c)]
            if not own:
                continue
            at = sorted({int(i) for c in own for i, _ in c["curve"]["dev"]})
            values = np.array([_held([(int(i), float(v)) for i, v in c["curve"]["dev"]], at) for c in own])
            ends = own[0]["curve"]["stage1_ends"]
            stage1 = [i for i in at if i <= ends] or at[:1]
            spread = values.std(0, ddof=1) if len(own) > 1 else np.zeros(len(at))
            rows.append(
                {
                    "method": method,
                    "task": task,
                    "n": len(own),
                    "stage1_ends": ends,
                    "at": at,
                    "mean": [round(100 * float(x), 2) for x in values.mean(0)],
                    "sd": [round(100 * float(x), 2) for x in spread],
                    "best_in_stage1": round(100 * float(values[:, : len(stage1)].max(1).mean()), 2),
                    "best": round(100 * float(values.max(1).mean()), 2),
                }
            )
    return rows


def _scored(cell: dict[str, Any]) -> bool:
    """Whether the cell was run, and on a task with a dev set."""
    return bool(cell.get("curve", {}).get("dev"))


def _held(points: list[tuple[int, float]], at: Sequence[int]) -> list[float]:
    found, last, left = [], points[0][1], list(points)
    for i in at:
        while left and left[0][0] <= i:
            last = left.pop(0)[1]
        found.append(last)
    return found


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel a paradigm and task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(4.2 * len(tasks), 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(PARADIGMS), len(tasks), squeeze=False)
    for line, (method, (name, unit)) in enumerate(PARADIGMS.items()):
        for column, task in enumerate(tasks):
            axis = panels[line, column]
            axis.set_title(f"{task}, {name}", fontsize=10)
            axis.set_xlabel(unit)
            axis.set_ylabel("dev score")
            own = [row for row in rows if (row["method"], row["task"]) == (method, task)]
            if not own:
                axis.text(0.5, 0.5, "no cells yet", ha="center", transform=axis.transAxes, color="0.5")
            for row in own:
                mean, sd = np.array(row["mean"]), np.array(row["sd"])
                axis.plot(row["at"], mean, color="tab:blue")
                axis.fill_between(row["at"], mean - sd, mean + sd, color="tab:blue", alpha=0.2, lw=0)
                axis.axvline(row["stage1_ends"], color="tab:green", linestyle="--", label="end of stage I")
                axis.legend(fontsize=8, loc="lower right")
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the best dev score in stage I and in both, a line a paradigm and task."""
    lines = [
        "| task | paradigm | seeds | best dev in stage I | best dev in both | stage II adds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        added = row["best"] - row["best_in_stage1"]
        lines.append(
            f"| {row['task']} | {PARADIGMS[row['method']][0]} | {row['n']} | {row['best_in_stage1']:.1f} | "
            f"{row['best']:.1f} | {added:+.1f} |"
        )
    return "\n".join(lines)


def run(words: Sequence[str] | None = None) -> None:
    """Compute cells, draw, write the JSON."""
    args = parser_of("figure3", __doc__, prompts=["mini-shallow"]).parse_args(words)
    settings = replace(settings_of(args), dev_every=DEV_EVERY)
    until, lab = deadline(args), None if args.table else Lab(settings, args.data, args.work)
    notes = choose(args, TASKS, tuple(PARADIGMS), lab)
    asked = [Cell(m, t, s) for s in seeds_of(args.seeds) for t in args.tasks for m in args.methods]
    if lab is not None:
        compute(args, lab, asked, until)
    if args.dry_run:
        return
    cells = read_cells(args.work)
    rows = curves(cells)
    if not rows and nothing_yet({args.work: asked}, cells, until):
        return
    state = state_of(args.work, asked, notes)
    write_json(
        args.out, {"made_by": made_by(cells), "codes": codes(cells), "rows": rows, "state": state}, indent=1
    )
    draw(rows, args.out.with_suffix(".png"))
    print(table(rows), "", code_line(cells), "", *state, sep="\n")
    check_failed({args.work: asked})

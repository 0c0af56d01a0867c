"""What the cells of a table cost: short runs of each method on two of the tasks, and arithmetic from them.

``--dry-run`` of every table and figure of cells. The tasks are those with the fewest and the most tokens to
train on. Of each method a run of a few generations or epochs is timed there, with its parts: a step (an
evaluation, or an epoch), scoring dev, a test example. A cell is its steps, dev scores and test examples at
these rates; those of the tasks between are interpolated by their tokens. Left out: the head that is tuned
first for ``*-tuned-head``, and what a cell takes to begin.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.paper.cells import Cell, Show
from benchmarks.paper.methods import OF_TUNE, UNTUNED, Lab
from mp2.runs.series import one_blas_thread
from mp2.tasks import MrcFormatter, few_shot_split, load_card, load_examples
from mp2.training.methods import METHODS as TUNE

EPOCHS, TESTS = 3, 20  # of a short run
DEV_EVERY = 10  # epochs, of `mp2 tune`


@dataclass(frozen=True)
class Rates:
    """Seconds of one method on one task: of a step, of scoring dev, of a test example (all its prompts)."""

    steps_an_epoch: float  # learning rates that are tried; of black-box methods 1
    step_s: float
    dev_s: float
    test_s: float


def is_gradient(method: str) -> bool:
    """Whether its steps are epochs."""
    return method in OF_TUNE or method.startswith("gradient")


def tokens_of(lab: Lab, cell: Cell) -> tuple[int, int]:
    """Tokens of a cell's training examples, and how many test examples it has."""
    card = load_card(cell.task)
    split = few_shot_split(card, load_examples(card, "train", lab.data), cell.seed, cell.shots)
    formatter = MrcFormatter(card, lab.backbone.tokenizer, lab.settings.max_tokens)
    fitting = [example for example in split.train if formatter.fits(example)]
    n_tokens = sum(formatter.training_input(e, i).n_tokens for i, e in enumerate(fitting))
    return n_tokens, len(load_examples(card, "test", lab.data, lab.settings.test_limit))


def rates_of(lab: Lab, cell: Cell, n_test: int) -> Rates:
    """From a short run of the cell, kept nowhere; of `UNTUNED` from the whole, with ``n_test`` examples."""
    n_layers = lab.backbone.config.n_layers
    searches_routers = not cell.method.startswith("bbt") and not is_gradient(cell.method)
    iters = 41 if "shallow" in cell.method or cell.method.startswith("bbt-") or cell.method == "bbt" else 0
    iters = iters or 20 * n_layers + (100 if searches_routers else 1)  # a visit of each layer
    with TemporaryDirectory() as folder:
        short = replace(lab.settings, iters=iters, epochs=EPOCHS, test_limit=TESTS)
        settings = lab.settings if cell.method in UNTUNED else short
        own = Lab(settings, lab.data, Path(folder))
        started = time.perf_counter()
        result = own.run(cell.method, cell.task, cell.seed, cell.shots)
        wall = time.perf_counter() - started
    if cell.method in UNTUNED:
        return Rates(1, 0.0, 0.0, wall / max(1, n_test))
    seconds, counts = result["seconds"], result["evaluations"]
    return Rates(
        result["iterations"] / EPOCHS if is_gradient(cell.method) else 1,
        (seconds["stage1"] + seconds["stage2"]) / result["iterations"],
        seconds["dev"] / max(1, counts["dev"]),
        seconds["test"] / max(1, result["examples"]["test"]),
    )


def between(low: float, high: float, share: float) -> float:
    """The value at ``share`` of the way from ``low`` to ``high``, not below 0."""
    return max(0.0, low + share * (high - low))


def cell_s(lab: Lab, method: str, low: Rates, high: Rates, share: float, n_test: int) -> tuple[float, float]:
    """(steps, seconds) of one cell on a task that is ``share`` of the way between two timed ones."""
    settings = lab.settings
    epochs = settings.epochs
    if method == "model-tuning":
        epochs = min(epochs, TUNE[method].epochs)
    steps = low.steps_an_epoch * epochs if is_gradient(method) else float(settings.iters)
    if low.step_s == high.step_s == 0:
        steps = 0.0
    round_steps = 100 if "shallow" in method else 20 * lab.backbone.config.n_layers
    n_dev = steps / (DEV_EVERY if is_gradient(method) else round_steps) + 2
    seconds = steps * between(low.step_s, high.step_s, share)
    seconds += n_dev * between(low.dev_s, high.dev_s, share) if steps else 0.0
    return steps, seconds + n_test * between(low.test_s, high.test_s, share)


def cost_rows(lab: Lab, cells: Sequence[Cell], show: Show) -> list[dict[str, Any]]:
    """A row a method: its cells, steps a cell, seconds a step on both timed tasks, core-hours in all."""
    torch.set_num_threads(1)
    first = {(c.task, c.shots): c for c in reversed(cells)}  # a cell of each task, of the first seed
    runs = {place: tokens_of(lab, cell) for place, cell in first.items() if _can(lab, "deep", cell)}
    rows = []
    with one_blas_thread():
        for method in dict.fromkeys(cell.method for cell in cells):
            own = [c for c in cells if c.method == method and (c.task, c.shots) in runs]
            own = [cell for cell in own if _can(lab, method, cell)]
            if not own:
                rows.append({"method": method, "cells": 0})
                continue
            ordered = sorted(own, key=lambda c: runs[c.task, c.shots][0])
            (least, n_least), (most, n_most) = (runs[c.task, c.shots] for c in (ordered[0], ordered[-1]))
            low = rates_of(lab, ordered[0], n_least)
            high = rates_of(lab, ordered[-1], n_most) if most > least else low
            total = steps = 0.0
            for cell in own:
                n_tokens, n_test = runs[cell.task, cell.shots]
                share = (n_tokens - least) / (most - least) if most > least else 0.0
                steps, seconds = cell_s(lab, method, low, high, share, n_test)
                total += seconds
            rows.append(
                {
                    "method": method,
                    "cells": len(own),
                    "step": "epoch" if is_gradient(method) else "evaluation",
                    "steps": round(steps),
                    "step_s": [round(low.step_s, 4), round(high.step_s, 4)],
                    "timed": [Path(c.task).stem for c in (ordered[0], ordered[-1])],
                    "core_hours": round(total / 3600, 3),
                }
            )
            show(_line(rows[-1]))
    return rows


def _can(lab: Lab, method: str, cell: Cell) -> bool:
    return lab.refusal(method, load_card(cell.task)) is None


def _line(row: dict[str, Any]) -> str:
    return f"{row['method']}: {row['cells']} cells, {row['core_hours']:.2f} core-hours"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a method, and their sum."""
    lines = [
        "| method | cells | steps a cell | seconds a step | core-hours |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if not row["cells"]:
            lines.append(f"| {row['method']} | 0: cannot be run here | | | |")
            continue
        steps = f"{row['steps']:,} {row['step']}s" if row["steps"] else ""
        low, high = row["step_s"]
        each = f"{low:.3f} ({row['timed'][0]}) to {high:.3f} ({row['timed'][1]})" if row["steps"] else ""
        lines.append(f"| {row['method']} | {row['cells']} | {steps} | {each} | {row['core_hours']:.2f} |")
    n, hours = (sum(row.get(key, 0) for row in rows) for key in ("cells", "core_hours"))
    return "\n".join([*lines, f"| all | {n} | | | {hours:.1f} |"])

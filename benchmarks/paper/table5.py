"""Table 5 of the paper: fast and slow learning, by gradient, on four tasks of unseen families.

Prompts that were pre-trained with two rates (routers faster) and with one: name them all in --prompts, deep
and shallow of each, as far as there are any; which is which, their own settings say. DRCD is not among our
data sets. A cell is a run of ``mp2 tune`` (``gradient``, ``gradient-shallow``).

    python -m benchmarks.paper table5 --data DIR --backbone B --prompts DEEP SHALLOW DEEP_ONE_RATE ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.cell_code import code_line, codes, made_by
from benchmarks.paper.cells import Cell, read_cells
from benchmarks.paper.methods import Lab
from benchmarks.paper.options import choose_tasks, compute, deadline, parser_of, seeds_of, settings_of
from benchmarks.paper.published import TABLE5, beside
from benchmarks.paper.state import (
    check_failed,
    failed_words,
    missing_words,
    nothing_yet,
    read_settings,
    state_of,
)
from benchmarks.paper.table3_scores import summarise
from mp2.errors import UsageError
from mp2.files import write_json
from mp2.prompts import PromptSet, load_prompts
from mp2.training.config import PretrainConfig

TASKS = ("chnsent", "tnews", "lcqmc")
METHOD = {"deep": "gradient", "shallow": "gradient-shallow"}
FOLDERS = {"w/o": "without", "w/": "with"}


def learning_of(prompts: PromptSet, name: str) -> str:
    """``w/`` fast and slow learning, ``w/o``: one rate for both; from the run that made the prompts."""
    try:
        rates = PretrainConfig(**prompts.meta.provenance["config"]).rates
    except (KeyError, TypeError):
        raise UsageError(f"{name} does not say at which rates it was pre-trained") from None
    return "w/" if rates[0] > rates[1] else "w/o"


def groups_of(names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Learning -> (kind, file) of the prompts; raises ``UsageError`` for two of one sort."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        prompts = load_prompts(name)
        own = found.setdefault(learning_of(prompts, name), [])
        if any(kind == prompts.kind for kind, _ in own):
            raise UsageError(f"--prompts: two files are {prompts.kind} prompts of the same learning: {name}")
        own.append((prompts.kind, name))
    return found


def rows_of(work: Path) -> list[dict[str, Any]]:
    """A row a kind, learning and task: mean, deviation, seeds."""
    rows = []
    for learning, folder in FOLDERS.items():
        for row in summarise(read_cells(work / folder)):
            kind = "shallow" if "shallow" in row["column"] else "deep"
            if "mean" in row and row["column"].startswith("gradient"):
                rows.append({**row, "kind": kind, "learning": learning})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: paper | ours +- sd | difference, a line a kind and learning for each task."""
    lines = [
        "| task | prompts | fast and slow | paper | ours | difference |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        paper = TABLE5[row["kind"], row["learning"]].get(row["task"])
        texts = " | ".join(beside(paper, row["mean"], row["sd"], row["n"]))
        lines.append(f"| {row['task']} | {row['kind']} | {row['learning']} | {texts} |")
    return "\n".join(lines)


def run(words: Sequence[str] | None = None) -> None:
    """Compute cells, or print the table."""
    args = parser_of("table5", __doc__).parse_args(words)
    if args.methods is not None:
        raise UsageError("table5 has one method, MP2 by gradient, for each kind of prompts: drop --methods")
    until = deadline(args)
    asked: dict[Path, list[Cell]] = {}
    labs: dict[Path, Lab] = {}
    notes = [] if args.table else choose_tasks(args, TASKS)
    for learning, files in () if args.table else groups_of(args.prompts).items():
        work = args.work / FOLDERS[learning]
        labs[work] = Lab(settings_of(args, [name for _, name in files]), args.data, work)
        asked[work] = [
            Cell(METHOD[kind], task, seed)
            for seed in seeds_of(args.seeds)
            for task in args.tasks
            for kind, _ in files
        ]
    seeds = seeds_of(args.seeds)
    parts = [[seed] for seed in seeds] if until < math.inf and not args.dry_run else [seeds]
    for part in parts:  # where time may end: both kinds of learning of one seed before the next
        for work, lab in labs.items():
            compute(args, lab, [cell for cell in asked[work] if cell.seed in part], until)
    if args.dry_run:
        return
    rows = rows_of(args.work)
    folders = [args.work / folder for folder in FOLDERS.values()]
    cells = {folder: found for folder in folders if (found := read_cells(folder))}
    if not cells and nothing_yet(asked or {args.work: []}, [], until):
        return
    every = [cell for own in cells.values() for cell in own]
    settings = read_settings(next(iter(cells)))
    state = state_of(next(iter(cells)), (), notes)
    for learning, folder in FOLDERS.items():
        work = args.work / folder
        own = [*missing_words(work, asked.get(work, [])), *failed_words(work, asked.get(work, []))]
        state += [f"{learning} fast and slow learning:", *own] if own else []
    about = {"made_by": made_by(every), "codes": codes(every), "settings": settings}
    write_json(args.out, {**about, "rows": rows, "state": state})
    print(table(rows), "", code_line(every), "", *state, sep="\n")
    check_failed(asked)

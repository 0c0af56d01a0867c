"""Table 3 of the paper at the size of a small backbone: every method, 12 tasks, 5 seeds, test scores.

The methods are in ``benchmarks/paper/methods.py``, beside majority, TF-IDF and a linear probe on the same
examples. Few-shot splits are drawn from train.jsonl by the seed; tests are the first ``--test-limit`` lines
of test.jsonl for all methods. CPM-2's lines are the paper's. One file in --prompts for each of: deep,
shallow, and where they are asked for spot, ppt, head (``mp2 pretrain --method``; recipes/prompts.sh).

    python -m benchmarks.paper table3 --data DIR [--backbone B] [--prompts FILE ...] [--iters N]
    python -m benchmarks.paper table3 --data DIR --table      # what is there so far, and the answers

A cell is one method on one task with one seed: one JSON file in ``--work``, written when it is done. Started
again, the command computes what is missing. Several processes may work on one folder, each on one thread
(``--jobs 2``, or start it twice), or a Ray cluster (``--ray ADDRESS``). docs/benchmarks.md has what it costs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.cell_code import code_line, codes, made_by, mixed
from benchmarks.paper.cells import Cell, read_cells
from benchmarks.paper.methods import DEFAULT_METHODS, Lab
from benchmarks.paper.options import choose, compute, deadline, parser_of, seeds_of, settings_of
from benchmarks.paper.state import check_failed, nothing_yet, read_settings, state_of, stored_settings
from benchmarks.paper.table3_render import beside_paper, markdown
from benchmarks.paper.table3_scores import answers, means, summarise
from mp2.errors import UnknownNameError, UsageError
from mp2.files import write_json
from mp2.prompts import load_prompts

TASKS = (
    *("lcqmc", "bq", "ccpm", "cote_mfw", "cote_bd", "amazon", "cmnli", "ocnli"),  # the quick ones first
    *("chnsent", "c3", "drcd", "cmrc2018", "thucnews", "tnews"),
)


def write_results(work: Path, out: Path, asked: Sequence[Cell] = (), notes: Sequence[str] = ()) -> str:
    """Write the JSON of all finished cells; returns the Markdown table with its answers.

    ``made_by`` there is the code of every method's cells, ``codes`` what is known of each, ``state`` the
    scale of the cells, ``notes``, and which of those that were ``asked`` for are missing or failed, in words.
    """
    cells = read_cells(work)
    if not cells:
        raise UsageError(f"there are no cells in {work} yet")
    upstream = upstream_tasks(stored_settings(work))
    settings = read_settings(work)
    rows = summarise(cells)
    found = answers(rows)
    summary = {"rows": rows, "answers": found, "core_minutes": round(sum(c["cpu_s"] for c in cells) / 60, 1)}
    code = {"made_by": made_by(cells), "mixed_code": mixed(cells), "codes": codes(cells)}
    state = state_of(work, asked, notes)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {**code, "settings": settings, "means": means(rows, upstream), **summary, "state": state})
    return "\n".join([markdown(rows, found, settings, upstream, code_line(cells)), "", *state])


def upstream_tasks(settings: dict[str, Any]) -> list[str] | None:
    """The tasks that any of a folder's prompts was pre-trained on; None: its files are gone, or others."""
    if "upstream_tasks" in settings:
        return sorted(Path(task).stem for task in settings["upstream_tasks"])
    weights, found = set(settings["weights"].values()), set[str]()
    for name in settings["prompts"]:
        try:
            prompts = load_prompts(name)
        except (UsageError, UnknownNameError):
            return None
        if prompts.sha256 not in weights:
            return None
        found |= set(prompts.meta.tasks)
    return sorted(found)


def run(words: Sequence[str] | None = None) -> None:
    """Compute cells, or print the table."""
    args = parser_of("table3", __doc__).parse_args(words)
    until, lab = deadline(args), None if args.table else Lab(settings_of(args), args.data, args.work)
    notes = choose(args, TASKS, DEFAULT_METHODS, lab)
    cells = [
        Cell(method, task, seed)
        for seed in seeds_of(args.seeds)
        for task in args.tasks
        for method in args.methods
    ]
    if lab is not None:
        compute(args, lab, cells, until)
    if args.dry_run:
        return
    if not read_cells(args.work) and nothing_yet({args.work: cells}, [], until):
        return
    print(write_results(args.work, args.out, cells, notes))
    print("", beside_paper(json.loads(args.out.read_text("utf-8"))["rows"]), sep="\n")
    check_failed({args.work: cells})

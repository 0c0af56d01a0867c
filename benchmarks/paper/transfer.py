"""Does MP2 transfer? Table 3 of the paper at the size of a small backbone: 12 tasks, 5 seeds, test scores.

For every task in DIR: majority class; untuned prompts (every module on); MP2 deep and shallow, two-stage and
router-only, by black-box tuning; BBT and BBTv2 from scratch with the same backbone, engine, examples and
budget; MP2 by gradient (``benchmarks/transfer_methods.py`` says what each method is). Few-shot splits are
drawn from train.jsonl by the seed; tests are the first ``--test-limit`` lines of test.jsonl for all methods.

    python -m benchmarks.paper.transfer --data DIR [--backbone mini] [--prompts mini-deep mini-shallow]
    python -m benchmarks.paper.transfer --data DIR --table          # what is there so far, and the answers

A cell is one method on one task with one seed: one JSON file in ``--work``, written when it is done. Started
again, the command computes what is missing. Several processes may work on one folder, each on one thread
(``--jobs 2``, or start it twice): a cell belongs to the process that holds its lock. With ``mini`` (4 layers
of 128, 128 tokens) the default costs about two core-hours; 8,000 iterations, as in the paper, would cost 40
times as much.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from filelock import FileLock, Timeout

from benchmarks.command import one_line_errors
from benchmarks.paper.cell_code import code_line, codes, made_by, mixed
from benchmarks.paper.transfer_methods import DEFAULT_METHODS, METHODS, Lab, Settings
from benchmarks.paper.transfer_render import markdown
from benchmarks.paper.transfer_table import answers, means, summarise
from benchmarks.provenance import RESULTS, provenance
from mp2.errors import MismatchError, UnknownNameError, UsageError
from mp2.files import write_json
from mp2.prompts import load_prompts
from mp2.runs.series import one_blas_thread, sigterm_exits
from mp2.tasks import load_card

SEEDS = (8, 13, 21, 42, 100)
TASKS = (
    *("lcqmc", "bq", "ccpm", "cote_mfw", "amazon", "cmnli"),  # the quick ones first
    *("chnsent", "c3", "cmrc2018", "iflytek", "thucnews", "tnews"),
)


def cell_file(work: Path, method: str, task: str, seed: int) -> Path:
    """Where a cell's result lies."""
    return work / "cells" / f"{Path(task).stem}.{method}.{seed}.json"


def read_cells(work: Path) -> list[dict[str, Any]]:
    """All finished cells, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((work / "cells").glob("*.json"))]


def claim_folder(work: Path, wanted: dict[str, Any]) -> None:
    """Write what the folder's cells share, or compare with what stands there.

    Raises:
        MismatchError: its cells were made with other settings or weights.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / "settings.json"
    with FileLock(work / "settings.lock"):
        if not path.exists():
            write_json(path, wanted)
            return
        found = json.loads(path.read_text())
    for name in wanted:
        if found.get(name) != json.loads(json.dumps(wanted[name])):
            raise MismatchError(
                f"the cells in {work} were made with {name} {found.get(name)}, got {wanted[name]}: "
                "take the same, or another --work"
            )


def run_cell(lab: Lab, method: str, task: str, seed: int, where_from: dict[str, Any]) -> dict[str, Any]:
    """Run one cell; a task that the backbone cannot hold is a result too."""
    card = load_card(task)
    cell: dict[str, Any] = {"task": card.task, "track": card.track, "metric": card.metric}
    cell |= {"method": method, "seed": seed}
    cpu, wall = time.process_time(), time.perf_counter()
    reason = None if method == "majority" else lab.refusal(card)
    if reason is None:
        result = lab.run(method, task, seed)
        cell |= {key: result[key] for key in ("stages", "iterations", "router") if key in result}
    else:
        cell["refused"] = reason
    cell["cpu_s"] = round(time.process_time() - cpu, 2)
    cell["wall_s"] = round(time.perf_counter() - wall, 2)
    return cell | {"provenance": where_from}


def work_through(
    lab: Lab, cells: list[tuple[int, str, str]], where_from: dict[str, Any], show: Any = print
) -> None:
    """Compute every (seed, task, method) that is neither there nor in another process's hands."""
    (lab.work / "cells").mkdir(parents=True, exist_ok=True)
    for seed, task, method in cells:
        file = cell_file(lab.work, method, task, seed)
        if file.exists():
            continue
        lock = FileLock(file.with_suffix(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        try:
            if file.exists():
                continue
            cell = run_cell(lab, method, task, seed, where_from)
            write_json(file, cell)
        finally:
            lock.release()
        show(f"{_line(cell)}  {_left(lab.work, cells)}")


def _line(cell: dict[str, Any]) -> str:
    name = f"{cell['task']} {cell['method']} seed {cell['seed']}"
    if "refused" in cell:
        return f"{name}: not run: {cell['refused']}"
    tests = [f"{stage} {100 * found['test_score']:.1f}" for stage, found in cell["stages"].items()]
    return f"{name}: {', '.join(tests)} ({cell['cpu_s']:.0f} s)"


def _left(work: Path, cells: list[tuple[int, str, str]]) -> str:
    """Core-minutes to go, by what cells of the same task and method have cost."""
    costs: dict[tuple[str, str], list[float]] = {}  # by task and method
    for cell in read_cells(work):
        costs.setdefault((cell["task"], cell["method"]), []).append(cell["cpu_s"])
    typical = mean(s for found in costs.values() for s in found)
    todo = [(Path(t).stem, m) for seed, t, m in cells if not cell_file(work, m, t, seed).exists()]
    seconds = sum(mean(costs[key]) if key in costs else typical for key in todo)
    return f"[{len(cells) - len(todo)}/{len(cells)}, about {seconds / 60:.0f} core-minutes to go]"


def write_results(work: Path, out: Path) -> str:
    """Write the JSON of all finished cells; returns the Markdown table with its answers.

    ``made_by`` there is the code of every method's cells, ``codes`` what is known of each.
    """
    cells = read_cells(work)
    if not cells:
        raise UsageError(f"there are no cells in {work} yet")
    settings = json.loads((work / "settings.json").read_text())
    upstream = upstream_tasks(settings)
    settings["backbone"] = Path(settings["backbone"]).name  # its name, not the folder of this machine
    settings["prompts"] = [Path(prompts).name for prompts in settings["prompts"]]
    rows = summarise(cells)
    found = answers(rows)
    summary = {"rows": rows, "answers": found, "core_minutes": round(sum(c["cpu_s"] for c in cells) / 60, 1)}
    code = {"made_by": made_by(cells), "mixed_code": mixed(cells), "codes": codes(cells)}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {**code, "settings": settings, "means": means(rows, upstream), **summary})
    return markdown(rows, found, settings, upstream, code_line(cells))


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


@one_line_errors(goes_on=True)
def main() -> None:
    """Compute cells, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--prompts", nargs="+", default=["mini-deep", "mini-shallow"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), help=", ".join(METHODS))
    parser.add_argument("--iters", type=int, default=200, help="of black-box tuning (paper: 8000)")
    parser.add_argument("--epochs", type=int, default=100, help="of gradient tuning (paper: 1000)")
    parser.add_argument("--test-limit", type=int, default=300, help="test examples scored, all methods alike")
    parser.add_argument("--max-tokens", type=int, default=128, help="as long as mini was trained on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", help="what the engine computes in")
    parser.add_argument("--work", type=Path, default=Path("runs/transfer"), help="folder of the cells")
    parser.add_argument("--out", type=Path, default=RESULTS / "transfer.json")
    parser.add_argument("--jobs", type=int, default=1, help="processes; one a core")
    parser.add_argument("--table", action="store_true", help="compute nothing: print what is there")
    args = parser.parse_args()
    if not args.table:
        _compute(args)
    print(write_results(args.work, args.out))


def _compute(args: argparse.Namespace) -> None:
    for method in args.methods:
        if method not in METHODS:
            raise UnknownNameError("method", method, METHODS)
    try:
        seeds = [int(part) for part in args.seeds.split(",")]
    except ValueError:
        raise UsageError(f"--seeds is '{args.seeds}', expected whole numbers with commas") from None
    others = [
        subprocess.Popen([sys.executable, "-m", "benchmarks.paper.transfer", *sys.argv[1:], "--jobs", "1"])
        for _ in range(args.jobs - 1)
    ]
    settings = Settings(
        backbone=args.backbone,
        prompts=tuple(args.prompts),
        iters=args.iters,
        epochs=args.epochs,
        test_limit=args.test_limit,
        max_tokens=args.max_tokens,
        device=args.device,
        precision=args.precision,
    )
    torch.set_num_threads(1)
    try:
        lab = Lab(settings, args.data, args.work)
        lab.check(args.methods)
        claim_folder(args.work, {**asdict(settings), "weights": lab.identity()})
        cells = [(seed, task, method) for seed in seeds for task in args.tasks for method in args.methods]
        with sigterm_exits(), one_blas_thread():
            work_through(lab, cells, provenance(), lambda line: print(line, file=sys.stderr, flush=True))
        for other in others:
            other.wait()
    finally:
        for other in others:
            other.terminate()


if __name__ == "__main__":
    main()

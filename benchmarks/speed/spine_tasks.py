"""Black-box tuning of real tasks end to end: dev and test before, after stage I, after stage II, minutes.

Runs ``mp2 bbt --task T --data DIR --iters 8000 --max-tokens 128 --threads 1`` for every task, ``--jobs`` at
a time, each a process with one thread; started again it resumes what was cut off and keeps what is done.

    python -m benchmarks.speed.spine_tasks --data DIR [--task NAME ...] [--iters 8000] [--jobs 2] [--out DIR]

On two cores the seven tasks of the default take about an hour with the backbone ``mini``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.command import one_line_errors
from benchmarks.provenance import save

TASKS = ["tnews", "cmrc2018", "c3", "chnsent", "lcqmc", "cote_mfw", "ccpm"]  # the long ones first


def tune(task: str, data: Path, out: Path, options: Sequence[str]) -> dict[str, Any]:
    """Run, resume or read one task's run; returns its result."""
    folder = out / task
    for run in sorted(folder.glob("*/")):
        if (run / "result.json").is_file():
            return dict(json.loads((run / "result.json").read_text()))
        if (run / "journal.jsonl").is_file():
            return _mp2(["bbt", "--resume", str(run), "--json"])
    where = ["--task", task, "--data", str(data), "--out", str(folder)]
    return _mp2(["bbt", *where, *options, "--json"])


def _mp2(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "mp2", *command], stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a task."""
    lines = [
        "| task | metric | untuned dev / test | stage I dev / test | stage II dev / test | minutes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        cells = []
        for stage in ("untuned", "stage1", "stage2"):
            found = result["stages"][stage]
            cells.append(" / ".join(f"{100 * found[key]:.1f}" for key in ("dev_score", "test_score")))
        seconds = result["seconds"]
        minutes = (seconds["stage1"] + seconds["stage2"] + seconds["dev"]) / 60
        lines.append(f"| {result['task']} | {result['metric']} | {' | '.join(cells)} | {minutes:.1f} |")
    return "\n".join(lines)


@one_line_errors(goes_on=True)
def main() -> None:
    """Run all tasks, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", nargs="+", default=TASKS)
    parser.add_argument("--iters", type=int, default=8000)
    parser.add_argument("--max-tokens", type=int, default=128, help="as long as mini was trained on")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/spine"))
    args = parser.parse_args()
    options = ["--iters", str(args.iters), "--threads", "1", "--max-tokens", str(args.max_tokens)]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda task: tune(task, args.data, args.out, options), args.task))
    print(table(results))
    print("written:", save("spine_tasks", results))


if __name__ == "__main__":
    main()

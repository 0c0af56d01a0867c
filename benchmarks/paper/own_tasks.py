"""Default `mp2 bbt` on five small tasks as a user brings them, and what the same 32 examples give without it.

The tasks are those of tests/own_tasks.json: templated Chinese sentences, two to ten labels; 32 examples in
all, 20 test sentences a label. Each draw has other examples. The head is what ``--head auto`` takes.

    python -m benchmarks.paper.own_tasks [--draws 8 13 21 42 100] [--iters 200]

The result is benchmarks/results/own_tasks.json. A run that is there in ``--work`` is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.command import one_line_errors
from benchmarks.paper.options import SEEDS
from benchmarks.provenance import RESULTS, provenance
from mp2.files import write_json
from mp2.runs import BbtConfig, start_run

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import own_tasks

COLUMNS = ("majority", "tfidf", "probe", "untuned", "tuned")


def run_draw(task: str, draw: int, iters: int, work: Path) -> dict[str, Any]:
    """The result of one run, as far as the table needs it; kept in ``work``."""
    file = work / "cells" / f"{task}.{draw}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return found
    data = work / "data" / str(draw)
    if not data.exists():
        own_tasks.write_tasks(data, seed=draw)
    config = BbtConfig(task=str(data / f"{task}.toml"), data=str(data), seed=draw, iters=iters, threads=1)
    result = start_run(config, work / "runs")
    scores = {key: line["test_score"] for key, line in result["baselines"].items()}
    scores |= {"untuned": result["stages"]["untuned"]["test_score"], "tuned": result["test_score"]}
    cell = {
        "task": task,
        "draw": draw,
        "iterations": result["iterations"],
        "head": result["head"]["kind"],
        "scores": scores,
        "verdict": result["verdict"],
        "calibration": result["calibration"],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, cell)
    return cell


def rows_of(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a task: test accuracy in per cent, mean and deviation (n - 1) over the draws.

    ``silent`` counts the draws whose score is at or below the majority class and whose verdict is empty.
    """
    rows = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        own = [cell for cell in cells if cell["task"] == task]
        row: dict[str, Any] = {"task": task, "labels": len(own_tasks.TASKS[task][1]), "draws": len(own)}
        for column in COLUMNS:
            percent = [100 * cell["scores"][column] for cell in own]
            row[column] = {
                "mean": round(mean(percent), 2),
                "sd": round(stdev(percent), 2) if own[1:] else 0.0,
            }
        row["heads"] = dict(Counter(cell["head"] for cell in own))
        row["calibration_error"] = round(mean(cell["calibration"]["test"]["error"] for cell in own), 3)
        below = [cell for cell in own if cell["scores"]["tuned"] <= cell["scores"]["majority"]]
        row["silent"] = sum(cell["verdict"] is None for cell in below)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a task."""
    head = ("majority", "TF-IDF", "linear probe", "default, untuned", "default, tuned")
    lines = [f"| task | labels | {' | '.join(head)} | head | ECE |"]
    lines.append("| --- | ---: |" + " ---: |" * len(head) + " --- | ---: |")
    for row in rows:
        cells = [f"{row[column]['mean']:.1f} ± {row[column]['sd']:.1f}" for column in COLUMNS]
        heads = ", ".join(f"{kind} {n}" for kind, n in row["heads"].items())
        lines.append(
            f"| {row['task']} | {row['labels']} | {' | '.join(cells)} | {heads} | "
            f"{row['calibration_error']:.3f} |"
        )
    return "\n".join(lines)


@one_line_errors(goes_on=True)
def main() -> None:
    """Run what is missing, write the result, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--draws", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("runs/own_tasks"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    where_from, cells = provenance(), []
    for draw in args.draws:
        for task in own_tasks.TASKS:
            cells.append(run_draw(task, draw, args.iters, args.work))
            shown = ", ".join(f"{key} {100 * x:.1f}" for key, x in cells[-1]["scores"].items())
            print(f"{task} draw {draw}: {shown}", file=sys.stderr, flush=True)
    rows = rows_of(cells)
    settings = {"draws": args.draws, "iters": args.iters}
    write_json(
        RESULTS / "own_tasks.json", {"provenance": where_from, "settings": settings, "rows": rows}, indent=1
    )
    print(table(rows))


if __name__ == "__main__":
    main()

"""`mp2 bbt` over encoders without pre-trained prompts: the ridge head and label words beside the baselines.

For each of the seven classification tasks in DIR and each seed: majority class, TF-IDF with logistic
regression and a linear probe of the frozen encoder; the ridge head and the checkpoint's own label-word head
(BBTv2's), untuned and tuned. Few-shot splits are drawn from train.jsonl by the seed; tests are the first
``--test-limit`` lines of test.jsonl for all. No prompt is pre-trained, whatever the backbone.

    python -m benchmarks.paper.heads --data DIR --backbone random     # a BERT of 4 x 128, weights from a seed
    python -m benchmarks.paper.heads --data DIR --backbone mini
    python -m benchmarks.paper.heads --data DIR --backbone DIR        # m3e-small, say: recipes/m3e_small.sh

A cell (head, task, seed) is a JSON file in ``--work``, written when it is done: started again, the command
computes what is missing. ``--table`` only writes the result, benchmarks/results/heads_BACKBONE.json, and
prints it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.command import one_line_errors
from benchmarks.paper.cell_code import codes, made_by, mixed
from benchmarks.paper.cells import claim_folder
from benchmarks.paper.options import SEEDS
from benchmarks.provenance import RESULTS, provenance
from mp2.backbone.load import EMBEDDED
from mp2.errors import UsageError
from mp2.files import write_json
from mp2.runs import BbtConfig, start_run
from mp2.runs.frozen_model import FrozenModel, load_model, resolve_paths

TASKS = ("chnsent", "bq", "lcqmc", "amazon", "cmnli", "thucnews", "tnews")
HEADS = ("ridge", "mlm")
LINES = {  # column -> (head of the cell, where its score is)
    "majority": ("ridge", "majority"),
    "TF-IDF": ("ridge", "tfidf"),
    "linear probe": ("ridge", "probe"),
    "ridge, untuned": ("ridge", "untuned"),
    "ridge, tuned": ("ridge", "tuned"),
    "label words, untuned": ("mlm", "untuned"),
    "label words, tuned": ("mlm", "tuned"),
}
RANDOM = "random"


def random_bert(folder: Path) -> Path:
    """A BERT of 4 layers of 128 with weights from seed 0 and mini's vocabulary, written once."""
    if not folder.exists():
        from transformers import BertConfig, BertForMaskedLM

        vocabulary = (EMBEDDED["mini"] / "vocab.txt").read_bytes()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary.decode().splitlines()),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=256,
        )
        BertForMaskedLM(config).save_pretrained(folder)
        (folder / "vocab.txt").write_bytes(vocabulary)
    return folder


def run_cell(config: BbtConfig, work: Path, model: FrozenModel) -> dict[str, Any]:
    """The scores of one head on one task with one seed."""
    cpu = time.process_time()
    result = start_run(config, work / "runs", model=model)
    scores = {
        "untuned": result["stages"]["untuned"]["test_score"],
        "tuned": result["test_score"],
        **{key: line["test_score"] for key, line in (result["baselines"] or {}).items()},
    }
    return {
        "task": result["task"],
        "method": config.head,
        "seed": config.seed,
        "scores": scores,
        "calibration": result["calibration"],
        "iterations": result["iterations"],
        "cpu_s": round(time.process_time() - cpu, 1),
    }


def rows_of(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task and column: mean and deviation (n - 1) over the seeds, in per cent.

    The mean over the tasks is a row of task ``mean``, from the seeds that have every task.
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    for cell in cells:
        for column, (head, key) in LINES.items():
            if cell["method"] == head and key in cell["scores"]:
                found.setdefault((cell["task"], column), {})[cell["seed"]] = 100 * cell["scores"][key]
    tasks = list(dict.fromkeys(task for task, _ in found))
    for column in LINES:
        own = [found[task, column] for task in tasks if (task, column) in found]
        seeds = set.intersection(*map(set, own)) if len(own) == len(tasks) else set()
        if seeds:
            found["mean", column] = {seed: mean(of[seed] for of in own) for seed in seeds}
    return [
        {
            "task": task,
            "column": column,
            "mean": round(mean(of_seed.values()), 2),
            "sd": round(stdev(of_seed.values()), 2) if len(of_seed) > 1 else 0.0,
            "seeds": len(of_seed),
        }
        for (task, column), of_seed in found.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a task and their mean, a column each of `LINES`."""
    by_place = {(row["task"], row["column"]): row for row in rows}
    columns = [column for column in LINES if any(row["column"] == column for row in rows)]
    lines = [f"| task | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for task in sorted(dict.fromkeys(task for task, _ in by_place), key=lambda task: task == "mean"):
        cells = [by_place.get((task, column)) for column in columns]
        texts = ["" if row is None else f"{row['mean']:.1f} ± {row['sd']:.1f}" for row in cells]
        lines.append(f"| {task} | {' | '.join(texts)} |")
    return "\n".join(lines)


def write_results(work: Path, name: str) -> str:
    """Write the JSON of all finished cells and return the table."""
    cells = [json.loads(path.read_text("utf-8")) for path in sorted((work / "cells").glob("*.json"))]
    if not cells:
        raise UsageError(f"there are no cells in {work} yet")
    settings = json.loads((work / "settings.json").read_text("utf-8"))
    code = {"made_by": made_by(cells), "mixed_code": mixed(cells), "codes": codes(cells)}
    rows = rows_of(cells)
    minutes = round(sum(cell["cpu_s"] for cell in cells) / 60, 1)
    path = RESULTS / f"heads_{name}.json"
    write_json(path, {**code, "settings": settings, "core_minutes": minutes, "rows": rows}, indent=1)
    return table(rows)


@one_line_errors(goes_on=True)
def main() -> None:
    """Compute cells, write the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--backbone", default=RANDOM, help=f"{RANDOM}, mini, or a folder")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--test-limit", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--work", type=Path, help="folder of the cells  [default: runs/heads_BACKBONE]")
    parser.add_argument("--table", action="store_true", help="compute nothing: write what is there")
    args = parser.parse_args()
    name = Path(args.backbone).name
    work = args.work or Path("runs") / f"heads_{name}"
    if not args.table:
        if args.data is None:
            raise UsageError("--data is missing: the folder of the downstream tasks")
        _compute(args, work)
    print(write_results(work, name))


def _compute(args: argparse.Namespace, work: Path) -> None:
    torch.set_num_threads(1)
    backbone = str(random_bert(work / "bert")) if args.backbone == RANDOM else args.backbone
    shared = {name: getattr(args, name) for name in ("iters", "test_limit", "max_tokens")}
    common = {"data": str(args.data), "backbone": backbone, "prompts": "scratch-deep", "threads": 1, **shared}
    model = load_model(resolve_paths(BbtConfig(task=args.tasks[0], **common)))
    claim_folder(work, {**shared, "backbone": Path(args.backbone).name, "weights": model.backbone.sha256})
    where_from = provenance()
    (work / "cells").mkdir(exist_ok=True)
    for seed in args.seeds:
        for head in args.heads:
            for task in args.tasks:
                file = work / "cells" / f"{task}.{head}.{seed}.json"
                if file.exists():
                    continue
                config = BbtConfig(task=task, seed=seed, head=head, baselines=head == "ridge", **common)
                cell = run_cell(config, work, model)
                write_json(file, cell | {"provenance": where_from})
                shown = ", ".join(f"{key} {100 * x:.1f}" for key, x in cell["scores"].items())
                print(f"{task} {head} seed {seed}: {shown} ({cell['cpu_s']:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    main()

"""What the same few-shot examples give without prompts: majority, TF-IDF, linear probe, nearest clause.

The lines that stand beside Table 3: for every task in DIR and the two embedded ones, ``mp2 baselines`` over
the seeds, with the splits and the first ``--test-limit`` test examples of Table 3.

    python -m benchmarks.paper.baselines --data DIR [--backbone mini] [--seeds 8 13 21 42 100]

Minutes on one core with ``mini``; the result is benchmarks/results/baselines_BACKBONE.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.command import one_line_errors
from benchmarks.paper.options import SEEDS
from benchmarks.paper.table3 import TASKS
from benchmarks.provenance import RESULTS, provenance
from mp2.backbone import load_backbone
from mp2.files import write_json
from mp2.runs.pooled_states import pooled_states
from mp2.tasks import TaskCard, few_shot_split, load_card, load_examples
from mp2.tasks.baselines import Baseline, baselines

DEMOS = ("demo_sentiment", "demo_topic")
COLUMNS = {  # what plays the part in each type of task
    "majority (extraction: whole context)": ("majority", "whole_context"),
    "TF-IDF (extraction: nearest clause)": ("tfidf", "nearest"),
    "linear probe": ("probe",),
}


def rows_of(card: TaskCard, seeds: Sequence[Sequence[Baseline]]) -> list[dict[str, Any]]:
    """A row for each baseline of one task: mean and deviation (n - 1) of its test score in per cent."""
    rows = []
    for lines in zip(*seeds, strict=True):  # one baseline, seed by seed
        row = {"task": card.task, "metric": card.metric, "baseline": lines[0].key, "name": lines[0].name}
        if lines[0].note is not None:
            rows.append(row | {"note": lines[0].note})
            continue
        percent = [100 * line.scores["test"] for line in lines]
        spread = stdev(percent) if len(percent) > 1 else 0.0
        rows.append(row | {"mean": round(mean(percent), 2), "sd": round(spread, 2), "n": len(percent)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a task, a column a kind of baseline."""
    lines = [f"| task | metric | {' | '.join(COLUMNS)} |", "| --- | --- |" + " ---: |" * len(COLUMNS)]
    for task in dict.fromkeys(row["task"] for row in rows):
        own = {row["baseline"]: row for row in rows if row["task"] == task}
        scored = {
            column: next((own[key] for key in keys if "mean" in own.get(key, {})), None)
            for column, keys in COLUMNS.items()
        }
        cells = ["" if row is None else f"{row['mean']:.1f} ± {row['sd']:.1f}" for row in scored.values()]
        lines.append(f"| {task} | {next(iter(own.values()))['metric']} | {' | '.join(cells)} |")
    return "\n".join(lines)


@one_line_errors()
def main() -> None:
    """Score every task and seed, write the result, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--backbone", default="mini", help="the encoder that is probed")
    parser.add_argument("--tasks", nargs="+", help="default: those of Table 3, and the demos")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--test-limit", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()
    tasks = options.tasks or [*(task for task in TASKS if (Path(options.data) / task).is_dir()), *DEMOS]
    where_from = provenance()
    states = pooled_states(load_backbone(options.backbone), options.max_tokens)
    rows: list[dict[str, Any]] = []
    for task in tasks:
        card, data = load_card(task), None if task in DEMOS else options.data
        pool = load_examples(card, "train", data)
        tests = load_examples(card, "test", data, options.test_limit)
        splits = (few_shot_split(card, pool, seed) for seed in options.seeds)
        rows += rows_of(card, [baselines(card, split.train, {"test": tests}, states) for split in splits])
        print(f"{task} done", flush=True)
    settings = {name: getattr(options, name) for name in ("seeds", "test_limit", "max_tokens")}
    settings["backbone"] = Path(options.backbone).name
    name = f"baselines_{settings['backbone']}.json"
    write_json(RESULTS / name, {"provenance": where_from, "settings": settings, "rows": rows}, indent=1)
    print(table(rows))


if __name__ == "__main__":
    main()

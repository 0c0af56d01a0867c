"""What the same few-shot examples give without prompts: majority, TF-IDF, linear probe, nearest clause.

The lines that stand beside Table 3: for every task in DIR and the two embedded ones, ``mp2 baselines`` over
the seeds, with the splits and the first ``--test-limit`` test examples of ``benchmarks.paper.transfer``.

    python -m benchmarks.paper.baselines --data DIR [--backbone mini] [--seeds 8 13 21 42 100]

Minutes on one core with ``mini``; the result is benchmarks/results/baselines_BACKBONE.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.command import one_line_errors
from benchmarks.paper.transfer import SEEDS, TASKS
from benchmarks.provenance import RESULTS, provenance
from mp2.files import write_json
from mp2.runs.baselines import task_baselines

DEMOS = ("demo_sentiment", "demo_topic")
TOO_FEW = "iflytek"  # 29 of its labels have fewer examples than train and dev need


def rows_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each baseline of one task: mean and deviation (n - 1) of its test score in per cent."""
    rows = []
    for key, line in found[0]["baselines"].items():
        scores = [one["baselines"][key]["test_score"] for one in found]
        row = {"task": found[0]["task"], "metric": found[0]["metric"], "baseline": key, "name": line["name"]}
        if None in scores:
            rows.append(row | {"note": line["note"]})
            continue
        percent = [100 * score for score in scores]
        spread = stdev(percent) if len(percent) > 1 else 0.0
        rows.append(row | {"mean": round(mean(percent), 2), "sd": round(spread, 2), "n": len(percent)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a task, a column a baseline; what a task's type has not is empty."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = [f"| task | metric | {' | '.join(names)} |", "| --- | --- |" + " ---: |" * len(names)]
    for task in dict.fromkeys(row["task"] for row in rows):
        own = {row["name"]: row for row in rows if row["task"] == task}
        metric = next(iter(own.values()))["metric"]
        cells = [
            f"{own[n]['mean']:.1f} ± {own[n]['sd']:.1f}" if n in own and "mean" in own[n] else ""
            for n in names
        ]
        lines.append(f"| {task} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


@one_line_errors()
def main() -> None:
    """Score every task and seed, write the result, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--backbone", default="mini", help="the encoder that is probed")
    parser.add_argument("--tasks", nargs="+", help="default: those of the transfer table, and the demos")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--test-limit", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()
    tasks = options.tasks or [*(task for task in TASKS if task != TOO_FEW), *DEMOS]
    where_from = provenance()
    rows: list[dict[str, Any]] = []
    for task in tasks:
        found = [
            task_baselines(
                task,
                data=None if task in DEMOS else options.data,
                backbone=options.backbone,
                seed=seed,
                max_tokens=options.max_tokens,
                test_limit=options.test_limit,
            )
            for seed in options.seeds
        ]
        rows += rows_of(found)
        print(f"{task} done", flush=True)
    settings = {name: getattr(options, name) for name in ("seeds", "test_limit", "max_tokens")}
    settings["backbone"] = Path(options.backbone).name
    name = f"baselines_{settings['backbone']}.json"
    write_json(RESULTS / name, {"provenance": where_from, "settings": settings, "rows": rows}, indent=1)
    print(table(rows))


if __name__ == "__main__":
    main()

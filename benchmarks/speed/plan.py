"""What ``mp2 bbt --explain`` predicts against what the run then takes, part by part.

For every task and kind of prompts: the plan (4 seconds and more of timing), then the whole run in the same
process. The target is a total within 20 %. Wants an otherwise idle machine.

    python -m benchmarks.speed.plan [--data DIR] [--task NAME ...] [--iters 600] [--backbone mini]

Without --data the embedded demo tasks; about 3 minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from mp2.runs.config import BbtConfig
from mp2.runs.planning import plan_run
from mp2.runs.run import make_problem
from mp2.runs.series import start_run

PARTS = ("stage1", "stage2", "dev", "test")


def run(config: BbtConfig) -> dict[str, Any]:
    """Predict a run and do it."""
    problem = make_problem(config)
    plan = plan_run(problem)
    model, kind = problem.model, problem.model.kind
    del problem
    with TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), time.process_time()
        result = start_run(config, Path(folder), model=model)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    predicted = {part: getattr(plan.seconds, f"{part}_s") for part in PARTS}
    predicted["stage1"] += plan.seconds.prepare_s  # the first forwards pay for it
    actual = {part: result["seconds"][part] for part in PARTS}
    total = sum(actual.values())
    return {
        "task": config.task,
        "kind": kind,
        "backbone": model.backbone.name,
        "runtime": model.runtime.name,
        "iterations": result["iterations"],
        "predicted_s": {part: round(s, 3) for part, s in predicted.items()},
        "actual_s": {part: round(s, 3) for part, s in actual.items()},
        "predicted_total_s": round(plan.seconds.total_s, 3),
        "actual_total_s": round(total, 3),
        "ratio": round(plan.seconds.total_s / total, 3),
        "planning_s": round(plan.costs.spent_s, 2),
        "wall_s": round(wall, 2),
        "cpu_s": round(cpu, 2),  # one thread: much less than wall_s on a machine that others use
    }


@one_line_errors()
def main() -> None:
    """Run all tasks and kinds, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("MP2_DATA"))
    parser.add_argument("--task", nargs="+", default=["demo_sentiment", "demo_topic"])
    parser.add_argument("--kind", nargs="+", default=["deep", "shallow"], choices=["deep", "shallow"])
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--iters", type=int, default=600)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--test-limit", type=int, default=500)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--name", default="plan", help="of the JSON in benchmarks/results")
    args = parser.parse_args()
    rows = []
    head = f"{'task':16} {'kind':8} " + " ".join(f"{part:>15}" for part in (*PARTS, "total")) + "  ratio"
    print(head + "   (predicted / actual seconds)", flush=True)
    for task in args.task:
        for kind in args.kind:
            config = BbtConfig(
                task=task,
                data=args.data,
                backbone=args.backbone,
                kind=kind,
                iters=args.iters,
                max_tokens=args.max_tokens,
                test_limit=args.test_limit,
                device=args.device,
                threads=args.threads,
            )
            row = run(config)
            rows.append(row)
            pairs = [(row["predicted_s"][part], row["actual_s"][part]) for part in PARTS]
            pairs.append((row["predicted_total_s"], row["actual_total_s"]))
            cells = " ".join(f"{f'{a:.2f} / {b:.2f}':>15}" for a, b in pairs)
            print(f"{task:16} {kind:8} {cells}  {row['ratio']:.2f}", flush=True)
    print("written:", save(args.name, rows))


if __name__ == "__main__":
    main()

"""Deep stage II of mp2 against a plain PyTorch loop (``benchmarks/plain_loop.py``), same machine, same run.

One round of divide and conquer (each layer visited once with a population of 20) is timed layer by layer;
before each visit the plain loop evaluates one candidate. The ratio is median plain time over mean visit
time a candidate, both in ms an evaluation (one candidate on the whole few-shot set).

Width 1024 is measured with 6 layers and 16 examples: a plain evaluation at 24 layers and 120 examples
takes over a minute on two cores. The ratio grows slightly with depth (L / ((L + 1) / 2)), so 6 layers
understate it.

    python -m benchmarks.speed.spine_speed --data DIR [--shape mini|256|1024] [--task NAME] [--runtime NAME]

DIR holds tnews/ and lcqmc/; without it the embedded demo tasks are timed. About 10 minutes for all on two
cores.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from benchmarks.speed.engine_work import INTRINSIC_DIM, PROMPT_TOKENS, SHAPES, make_backbone, task_inputs
from benchmarks.speed.plain_loop import PlainLoop
from mp2.engine import Objective, create_runtime
from mp2.export import export_engine
from mp2.prompts import random_prompts

POPULATION = 20


def run(shape: str, task: str, runtime_name: str, data: Path | None, engines: Path) -> dict[str, Any]:
    """Time one backbone shape on one task; times in ms an evaluation."""
    backbone = make_backbone(shape)
    prompts = random_prompts(
        backbone, "deep", prompt_tokens=PROMPT_TOKENS, intrinsic_dim=INTRINSIC_DIM, seed=1
    )
    limit = None if shape == "mini" else SHAPES[shape][3]
    inputs = task_inputs(task, backbone, data, limit)
    engine_dir = None
    if runtime_name == "onnxruntime":
        engine_dir = engines / backbone.name
        if not engine_dir.is_dir():
            export_engine(backbone, engine_dir)
    runtime = create_runtime(runtime_name, backbone, engine_dir=engine_dir)
    objective = Objective(runtime, backbone, prompts, inputs)
    plain = PlainLoop(backbone, prompts, inputs)
    rng = np.random.default_rng(0)
    n_layers = backbone.config.n_layers
    z = rng.standard_normal((n_layers, INTRINSIC_DIM)).astype(np.float32)
    candidates = rng.standard_normal((POPULATION, INTRINSIC_DIM)).astype(np.float32)
    objective.set_incumbent(z)
    objective.layer_losses(0, candidates[:2])  # warm-up
    plain.loss(z)
    plain_s, visit_s = [], []
    for layer in range(n_layers):
        start = time.perf_counter()
        plain.loss(z)
        plain_s.append(time.perf_counter() - start)
        start = time.perf_counter()
        losses = objective.layer_losses(layer, candidates)
        objective.commit(layer, candidates[int(np.argmin(losses))])
        visit_s.append((time.perf_counter() - start) / POPULATION)
    lengths = [x.n_tokens for x in inputs]
    return {
        "shape": shape,
        "task": task,
        "runtime": runtime_name,
        "n_examples": len(inputs),
        "mean_tokens": round(float(np.mean(lengths)), 1),
        "max_tokens": max(lengths),
        "plain_ms": round(median(plain_s) * 1e3, 2),
        "stage2_ms": round(float(np.mean(visit_s)) * 1e3, 2),
        "ratio": round(median(plain_s) / float(np.mean(visit_s)), 2),
    }


@one_line_errors()
def main() -> None:
    """Time all shapes and tasks asked for, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MP2_DATA"))
    parser.add_argument("--shape", nargs="+", default=["mini", "256", "1024"], choices=["mini", *SHAPES])
    parser.add_argument("--task", nargs="+")
    parser.add_argument("--runtime", nargs="+", default=["torch", "onnxruntime"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3, help="the median ratio of so many; 1 at width 1024")
    parser.add_argument("--engines", type=Path, default=Path("engines"), help="where engine folders are kept")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tasks = args.task or (["tnews", "lcqmc"] if args.data else ["demo_topic", "demo_sentiment"])
    print(f"{'shape':>6} {'task':15} {'runtime':12} {'plain ms':>9} {'ours ms':>9} {'ratio':>6}", flush=True)
    for shape in args.shape:
        rows = []
        for task in tasks:
            for runtime in args.runtime:
                repeats = args.rounds if shape in ("mini", "256") else 1
                found = [run(shape, task, runtime, args.data, args.engines) for _ in range(repeats)]
                row = sorted(found, key=lambda r: r["ratio"])[len(found) // 2]
                row["ratios"] = [r["ratio"] for r in found]
                rows.append(row)
                print(
                    f"{shape:>6} {task:15} {runtime:12} {row['plain_ms']:9.1f} {row['stage2_ms']:9.1f} "
                    f"{row['ratio']:6.2f}",
                    flush=True,
                )
        print("written:", save(f"spine_speed_{shape}", rows))


if __name__ == "__main__":
    main()

"""Deep stage II of mp2 against a plain PyTorch loop (``benchmarks/plain_loop.py``), same machine, same run.

One round of divide and conquer (each layer visited once with a population of 20) is timed layer by layer;
before each visit the plain loop evaluates one candidate. The ratio is median plain time over mean visit
time a candidate, both in ms an evaluation (one candidate on the whole few-shot set).

Width 1024 is measured with 6 layers and 16 examples: a plain evaluation at 24 layers and 120 examples
takes over a minute on two cores. The ratio grows slightly with depth (L / ((L + 1) / 2)), so 6 layers
understate it.

    python -m benchmarks.spine_speed --data DIR [--shape mini|256|1024] [--task NAME] [--runtime NAME]

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
from benchmarks.plain_loop import PlainLoop
from benchmarks.provenance import save
from mp2.backbone import Backbone, BackboneConfig, load_backbone, random_backbone
from mp2.engine import Objective, create_runtime
from mp2.export import export_engine
from mp2.prompts import random_prompts
from mp2.tasks import MrcFormatter, few_shot_split, load_card, load_examples

POPULATION = 20
SEED = 42
SHAPES = {  # layers, hidden, heads, largest number of examples
    "256": (4, 256, 8, None),
    "1024": (6, 1024, 16, 16),
}


def make_backbone(shape: str) -> tuple[Backbone, int | None]:
    """The embedded backbone, or a random one of that width with its vocabulary."""
    mini = load_backbone("mini")
    if shape == "mini":
        return mini, None
    layers, hidden, heads, limit = SHAPES[shape]
    config = BackboneConfig(
        name=f"random-{shape}",
        n_layers=layers,
        hidden=hidden,
        n_heads=heads,
        ffn=4 * hidden,
        vocab_size=mini.config.vocab_size,
        max_positions=512,
    )
    return random_backbone(config, mini.tokenizer.tokens(), seed=0), limit


def run(shape: str, task: str, runtime_name: str, data: Path | None, engines: Path) -> dict[str, Any]:
    """Time one backbone shape on one task; times in ms an evaluation."""
    backbone, limit = make_backbone(shape)
    m = 50
    prompts = random_prompts(backbone, "deep", prompt_tokens=m, intrinsic_dim=300, seed=1)
    card = load_card(task)
    train = few_shot_split(card, load_examples(card, "train", data), SEED).train[:limit]
    formatter = MrcFormatter(card, backbone.tokenizer, backbone.config.max_positions - m)
    inputs = [formatter.training_input(example, i) for i, example in enumerate(train)]
    engine_dir = None
    if runtime_name == "onnxruntime":
        engine_dir = engines / backbone.name
        if not engine_dir.is_dir():
            export_engine(backbone, engine_dir)
    runtime = create_runtime(runtime_name, backbone, engine_dir=engine_dir)
    objective = Objective(runtime, backbone, prompts, inputs)
    plain = PlainLoop(backbone, prompts, inputs)
    rng = np.random.default_rng(0)
    n_layers, d = backbone.config.n_layers, prompts.meta.intrinsic_dim
    z = rng.standard_normal((n_layers, d)).astype(np.float32)
    candidates = rng.standard_normal((POPULATION, d)).astype(np.float32)
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
    parser.add_argument("--rounds", type=int, default=3, help="repetitions, the median ratio is kept")
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
                repeats = 1 if shape == "1024" else args.rounds
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

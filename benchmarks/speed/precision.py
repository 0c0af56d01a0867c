"""What low precision does to the order of candidates, and what it saves: fp16, bf16 and fp8 against fp32.

CMA-ES uses nothing of the losses but their ranks within a generation. For each task: the embedded backbone
and prompts, the fused prompts of the untuned router as incumbent, and at several layers a first population of
CMA-ES as stage II makes it (20 candidates, the paper's step sizes: 5e-2 at the input layer, 1e-2 at the
others). Reported are the Spearman rank correlation with the same precision of reference (fp32, and bf16 for
fp8), the largest error of a loss, and the spread of the losses, without which neither means much. Ranks are
measured wherever this runs; on a GPU also milliseconds an evaluation, and with --large those at the shape of
CPT-large (random weights, 20 candidates of 32 x 64 tokens through all layers).

    python -m benchmarks.speed.precision [--device cuda] [--data DIR --task NAME ...] [--large]

Under a minute a task on two cores; fp8 products there are emulated by torch, so that their time says nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from mp2.backbone import load_backbone
from mp2.engine import Objective
from mp2.engine.cuda.backend import CUDA_PRECISIONS, CudaBackend
from mp2.optimizers.cma_layers import layer_searches
from mp2.optimizers.config import LayerConfig
from mp2.prompts import load_prompts, random_prompts
from mp2.tasks import MrcFormatter, MrcInput, few_shot_split, load_card, load_examples

SEED = 42


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation."""
    ranks = [x.argsort().argsort() for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def populations(n_layers: int, d: int, chosen: Sequence[int]) -> dict[int, np.ndarray]:
    """First populations of CMA-ES at some layers, offsets [20, d]."""
    config = LayerConfig()
    sigmas = [config.sigma(layer, "deep") for layer in range(n_layers)]
    searches = layer_searches(sigmas, d, config, np.random.SeedSequence(SEED))
    return {layer: searches[layer].ask() for layer in chosen}


def losses_of(
    precision: str, task: str, data: Path | None, device: str
) -> tuple[dict[int, np.ndarray], float, str]:
    """Losses [20] by layer, milliseconds an evaluation (on a GPU), notes on the runtime."""
    backbone = load_backbone("mini")
    prompts = load_prompts("mini-deep", backbone)
    card = load_card(task)
    formatter = MrcFormatter(card, backbone.tokenizer, 128)
    pool = [e for e in load_examples(card, "train", data) if formatter.fits(e)]
    train = few_shot_split(card, pool, SEED).train
    inputs = [formatter.training_input(example, i) for i, example in enumerate(train)]
    runtime = CudaBackend(backbone, device=device, precision=precision)
    objective = Objective(runtime.forward(prompts), inputs)
    z = prompts.fuse(torch.ones(prompts.z.shape[:2])).numpy()
    objective.set_incumbent(z)
    found, times = {}, []
    n_layers, d = z.shape
    for layer, offsets in populations(n_layers, d, range(n_layers)).items():
        candidates = (z[layer] + offsets).astype(np.float32)
        found[layer] = objective.layer_losses(layer, candidates).fetch()
        for _ in range(3 if device != "cpu" else 0):  # emulated, a time would say nothing
            start = time.perf_counter()
            objective.layer_losses(layer, candidates).fetch()
            times.append((time.perf_counter() - start) / len(candidates))
    return found, 1e3 * median(times or [0.0]), runtime.notes


def compare(task: str, data: Path | None, device: str) -> list[dict[str, Any]]:
    """All precisions on one task."""
    losses: dict[str, dict[int, np.ndarray]] = {}
    rows = []
    for precision in CUDA_PRECISIONS:
        losses[precision], ms, notes = losses_of(precision, task, data, device)
        row: dict[str, Any] = {
            "backbone": "mini",
            "task": task,
            "device": device,
            "precision": precision,
            "notes": notes,
        }
        if device != "cpu":
            row["evaluation_ms"] = round(ms, 4)
        for reference in ("fp32", "bf16") if precision == "fp8" else ("fp32",):
            pairs = [(losses[precision][layer], exact) for layer, exact in losses[reference].items()]
            row[f"spearman_to_{reference}"] = [round(spearman(a, b), 4) for a, b in pairs]
            row[f"error_to_{reference}"] = float(
                f"{max(float(np.abs(a - b).max() / b.mean()) for a, b in pairs):.2g}"
            )
        row["spread"] = [float(f"{np.ptp(x) / x.mean():.2g}") for x in losses["fp32"].values()]
        rows.append(row)
    return rows


def large(device: str) -> list[dict[str, Any]]:
    """Milliseconds an evaluation at CPT-large's shape, and the share of the bf16 matrix rate."""
    from benchmarks.speed.engine_work import matrix_rate, necessary_flops
    from benchmarks.speed.table4 import make_backbone

    backbone = make_backbone(24)
    prompts = random_prompts(backbone, "deep", prompt_tokens=50, intrinsic_dim=300, seed=1)
    rng = np.random.default_rng(0)
    inputs = [
        MrcInput(
            example=k,
            input_ids=rng.integers(5, 20000, 64),
            start=1,
            end=2,
            option_spans=np.empty((0, 2), np.int64),
        )
        for k in range(32)
    ]
    flops = necessary_flops(backbone.config, [64] * 32, 24, prompts.meta.prompt_tokens)
    z = rng.standard_normal((20, *prompts.z.shape[::2])).astype(np.float32)
    rows, rounds = [], 5
    objectives = {}
    for precision in ("bf16", "fp8", "fp16"):
        runtime = CudaBackend(backbone, device=device, precision=precision)
        objectives[precision] = Objective(runtime.forward(prompts), inputs)
        for _ in range(3):
            objectives[precision].full_losses(z).fetch()
    times: dict[str, list[float]] = {precision: [] for precision in objectives}
    rates = []
    for _ in range(rounds):  # taking turns
        rates.append(matrix_rate(device, "bf16"))
        for precision, objective in objectives.items():
            start = time.perf_counter()
            objective.full_losses(z).fetch()
            times[precision].append((time.perf_counter() - start) / len(z))
    for precision, objective in objectives.items():
        seconds = median(times[precision])
        rows.append(
            {
                "backbone": backbone.name,
                "device": torch.cuda.get_device_name(device),
                "precision": precision,
                "notes": objective.forward.backend.notes,
                "record_s": round(objective.forward.graphs.record_s, 2),
                "evaluation_ms": round(1e3 * seconds, 3),
                "tflops": round(flops / seconds / 1e12, 1),
                "bf16_matrix_tflops": round(median(rates) / 1e12, 1),
                "share": round(flops / seconds / median(rates), 3),
                "speed_to_bf16": round(median(times["bf16"]) / seconds, 3),
            }
        )
    return rows


@one_line_errors()
def main() -> None:
    """Compare on all tasks asked for, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MP2_DATA"))
    parser.add_argument("--task", nargs="+", default=["demo_sentiment", "demo_topic"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", action="store_true", help="time the shape of CPT-large, too (GPU only)")
    parser.add_argument("--name", help="of the JSON in benchmarks/results")
    args = parser.parse_args()
    rows = []
    for task in args.task:
        for row in compare(task, args.data, args.device):
            rows.append(row)
            ranks = row["spearman_to_fp32"]
            beside = f", to bf16 {np.mean(row['spearman_to_bf16']):.3f}" if row["precision"] == "fp8" else ""
            print(
                f"{task:16} {row['precision']:5} Spearman to fp32 {np.mean(ranks):.3f} "
                f"(least {min(ranks):.3f}){beside}, "
                f"error {row['error_to_fp32']:.1g}, spread {min(row['spread']):.1g}",
                flush=True,
            )
    if args.large:
        for row in large(args.device):
            rows.append(row)
            print(
                f"24 x 1024 {row['precision']:5} {row['evaluation_ms']:.3f} ms an evaluation, "
                f"{row['tflops']:.0f} TFLOP/s, {100 * row['share']:.0f}% of bf16's matrix rate, "
                f"{row['speed_to_bf16']:.2f} times bf16",
                flush=True,
            )
    print("written:", save(args.name or ("precision" if args.device == "cpu" else "precision_cuda"), rows))


if __name__ == "__main__":
    main()

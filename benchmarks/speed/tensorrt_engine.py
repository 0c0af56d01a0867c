"""TensorRT: build, verify and time the engine on one task; or, without a GPU, what each precision costs.

On a machine with an NVIDIA GPU, TensorRT and onnxruntime-gpu (docs/engines.md), one command does it all:
typed graphs, engines of ONNX Runtime's TensorRT provider, every stage against torch in float32, ranks of
populations, and ms an evaluation (one candidate on the whole few-shot set) of stage I and of deep stage II,
beside the torch runtime on the same GPU.

    python -m benchmarks.speed.tensorrt_engine --work DIR [--precision fp16] [--backbone mini] [--task NAME]

Without a GPU, ``--emulate`` runs the same graphs on the CPU, rounded where they round (about two minutes),
and reports ranks and loss errors only.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from mp2.backbone import Backbone, load_backbone
from mp2.engine import Objective, create_backend
from mp2.engine.agreement import agreement
from mp2.engine.chain import ChainBackend
from mp2.engine.folder import TYPED_PRECISIONS
from mp2.engine.tensorrt.profiles import TaskShapes
from mp2.errors import MissingDependencyError
from mp2.export import compare_stages, export_engine
from mp2.export.emulated import EmulatedBackend
from mp2.export.input_maxima import task_inputs
from mp2.export.parity import check
from mp2.prompts import PromptSet, load_prompts, random_prompts
from mp2.tasks import MrcInput

RUNTIME = "onnxruntime-tensorrt"
POPULATION = 20
RANKED = 60  # candidates whose order is compared: three generations' worth, so that the figure is steady
ROUNDS = 5


def ranks(
    runtime: ChainBackend, backbone: Backbone, prompts: PromptSet, inputs: list[MrcInput]
) -> dict[str, Any]:
    """Rank agreement and loss error of populations at each layer."""
    rows = [
        agreement(runtime, prompts, inputs, layer, n_candidates=RANKED)
        for layer in range(backbone.config.n_layers)
    ]
    return {
        "spearman_by_layer": [round(row.spearman, 4) for row in rows],
        "spearman_min": round(min(row.spearman for row in rows), 4),
        "loss_error_max": max(row.max_error for row in rows),
        "loss_spread_min": min(row.spread for row in rows),
    }


def times(
    runtime: ChainBackend, backbone: Backbone, prompts: PromptSet, inputs: list[MrcInput]
) -> dict[str, Any]:
    """ms an evaluation: a stage I population, and stage II by layer (medians of rounds after a first)."""
    objective = Objective(runtime.forward(prompts), inputs)
    z = prompts.fuse(torch.ones(prompts.z.shape[:2])).detach().numpy()
    rng = np.random.default_rng(0)
    full = z + 0.05 * rng.standard_normal((POPULATION, *z.shape))
    objective.set_incumbent(z)

    def measure(losses: Any, *args: Any) -> float:
        seconds = []
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            losses(*args).fetch()
            seconds.append(time.perf_counter() - start)
        return 1e3 * median(seconds[1:]) / POPULATION

    visits = [measure(objective.layer_losses, layer, full[:, layer]) for layer in range(len(z))]
    return {
        "stage1_ms": round(measure(objective.full_losses, full), 3),
        "stage2_ms": round(sum(visits) / len(visits), 3),
        "stage2_ms_by_layer": [round(ms, 3) for ms in visits],
    }


def run(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """One precision."""
    backbone = load_backbone(args.backbone)
    if args.prompts == "random":
        prompts = random_prompts(backbone, "deep", seed=1)
    else:
        prompts = load_prompts(args.prompts, backbone)
    inputs = task_inputs(backbone, args.task, args.data)
    shapes = TaskShapes.of_lengths(
        [item.n_tokens for item in inputs],
        candidates=POPULATION,
        prompt_tokens=prompts.meta.prompt_tokens,
    )
    out = args.work / f"{backbone.config.name}-{args.task}-{precision}"
    row: dict[str, Any] = {
        "backbone": backbone.config.name,
        "task": args.task,
        "examples": len(inputs),
        "precision": precision,
        "runtime": "emulated on the CPU" if args.emulate else f"{RUNTIME} on {torch.cuda.get_device_name()}",
    }
    started = time.perf_counter()
    export_engine(backbone, out, precision=precision, prompts=prompts, shapes=shapes)
    row["export_s"] = round(time.perf_counter() - started, 1)
    if args.emulate:
        runtime = EmulatedBackend(backbone, out, precision)
        return row | ranks(runtime, backbone, prompts, inputs)
    started = time.perf_counter()
    runtime = create_backend(RUNTIME, backbone, engine_dir=out, device="cuda", precision=precision)
    check(compare_stages(runtime, backbone), lambda comparison: None, f"{RUNTIME} in {precision}")
    row["build_s"] = round(time.perf_counter() - started, 1)
    row |= ranks(runtime, backbone, prompts, inputs)
    row |= times(runtime, backbone, prompts, inputs)
    beside = create_backend("torch", backbone, device="cuda", precision=precision)
    row["torch"] = times(beside, backbone, prompts, inputs)
    return row


@one_line_errors()
def main() -> None:
    """Run the precisions, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where engine folders are written")
    parser.add_argument("--precision", nargs="+", default=list(TYPED_PRECISIONS), choices=TYPED_PRECISIONS)
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--prompts", default="mini-deep", help="prompts of the backbone, or 'random'")
    parser.add_argument("--task", default="demo_sentiment")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--emulate", action="store_true", help="on the CPU, ranks only")
    args = parser.parse_args()
    if not args.emulate and not torch.cuda.is_available():
        raise MissingDependencyError(
            f"torch {torch.__version__} sees no CUDA device; run this where there is a GPU and a CUDA build "
            "of torch, or with --emulate for the ranks alone"
        )
    args.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for precision in args.precision:
        rows.append(run(args, precision))
        print({name: value for name, value in rows[-1].items() if name != "stage2_ms_by_layer"}, flush=True)
    print("written:", save(f"tensorrt_{'emulated' if args.emulate else 'engine'}_{args.task}", rows))


if __name__ == "__main__":
    main()

"""ONNX Runtime on one CPU thread against torch, and what its time goes to.

Deep prompts, populations of 20, ms an evaluation (one candidate on the whole few-shot set) in CPU seconds of
the thread, the engines taking turns (medians of ``--rounds``): stage I (a full forward) and deep stage II
(mean of the visits); ``small``: in micro-batches a quarter as large. Then, from ONNX Runtime's profiler, what
the time of some rows of one layer goes to: several texts under one prefix, one text under several.

    python -m benchmarks.speed.onnx_operators --data DIR [--shape mini 1024] [--task lcqmc]

``1024`` has two layers and four examples. About two minutes each on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from benchmarks.speed.engine_work import (
    INTRINSIC_DIM,
    PROMPT_TOKENS,
    make_backbone,
    shaped_backbone,
    task_inputs,
)
from mp2.backbone import Backbone
from mp2.engine import Objective
from mp2.engine.chain import ChainBackend
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.folder import layer_file
from mp2.engine.onnx.backend import OnnxBackend
from mp2.engine.onnx.library import load_onnxruntime
from mp2.export import export_engine
from mp2.prompts import random_prompts

ort = load_onnxruntime()
POPULATION = 20
FEW = 4  # examples at width 1024
PROFILED = 10  # runs


def thread_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def compare(shape: str, task: str, data: Path | None, rounds: int, folder: Path) -> dict[str, Any]:
    """Time all engines on one backbone and task."""
    backbone = make_backbone("mini") if shape == "mini" else shaped_backbone(2, 1024, 16)
    engine = folder / backbone.name
    if not engine.is_dir():
        export_engine(backbone, engine)
    n_layers = backbone.config.n_layers
    prompts = random_prompts(
        backbone, "deep", prompt_tokens=PROMPT_TOKENS, intrinsic_dim=INTRINSIC_DIM, seed=1
    )
    inputs = task_inputs(task, backbone, data, None if shape == "mini" else FEW)
    torch_runtime = CpuBackend(backbone)
    onnx_runtime = OnnxBackend(backbone, engine, threads=1)
    tokens = torch_runtime.usual_tokens()
    made: dict[str, tuple[ChainBackend, int]] = {
        "torch": (torch_runtime, tokens),
        "onnxruntime": (onnx_runtime, tokens),
        "onnxruntime, small": (onnx_runtime, tokens // 4),
    }
    objectives = {
        name: Objective(runtime.forward(prompts, micro_batch_tokens=size), inputs)
        for name, (runtime, size) in made.items()
    }
    rng = np.random.default_rng(0)
    z = rng.standard_normal((n_layers, INTRINSIC_DIM)).astype(np.float32)
    moves = rng.standard_normal((POPULATION, INTRINSIC_DIM)).astype(np.float32)
    routers = rng.random((POPULATION, *prompts.z.shape[:2])) < 0.5

    def visits(objective: Objective) -> None:
        for layer in range(n_layers):
            losses = objective.layer_losses(layer, z[layer] + moves).fetch()
            objective.commit(layer, z[layer] + moves[int(np.argmin(losses))])

    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in objectives}
    for objective in objectives.values():  # opens sessions and packs weights
        objective.set_incumbent(z)
        objective.layer_losses(0, z[0] + moves[:2]).fetch()
    for _ in range(rounds):
        for name, objective in objectives.items():
            stage1 = thread_seconds(lambda o=objective: o.router_losses(routers).fetch())  # type: ignore[misc]
            stage2 = thread_seconds(lambda o=objective: visits(o))  # type: ignore[misc]
            times[name][0].append(1e3 * stage1 / POPULATION)
            times[name][1].append(1e3 * stage2 / POPULATION / n_layers)
    exact = objectives["torch"].router_losses(routers).fetch()
    rows = {
        name: {
            "micro_batch_tokens": made[name][1],
            "stage1_ms": round(median(stage1), 2),
            "stage2_ms": round(median(stage2), 2),
            "stage1_best_ms": round(min(stage1), 2),
            "stage2_best_ms": round(min(stage2), 2),
            "loss_error": float(
                f"{np.abs(objectives[name].router_losses(routers).fetch() - exact).max():.1e}"
            ),
        }
        for name, (stage1, stage2) in times.items()
    }
    return {
        "shape": shape,
        "layers": n_layers,
        "hidden": backbone.config.hidden,
        "task": task,
        "n_examples": len(inputs),
        "mean_tokens": round(mean(x.n_tokens for x in inputs), 1),
        "rounds": rounds,
        "onnxruntime": ort.__version__,
        "engines": rows,
        "operators": operators(backbone, engine, tokens // 4),
    }


def operators(backbone: Backbone, engine: Path, tokens: int, length: int = 51) -> dict[str, dict[str, float]]:
    """Share of each operator in the time of layer 1, by graph and kind of input."""
    config, rng = backbone.config, np.random.default_rng(0)
    n = tokens // length
    graph = engine / layer_file(1, "onnx")
    found = {}
    for kind, texts, prefixes in (("texts", n, 1), ("one text", 1, n)):
        shape = (prefixes, 1, config.n_heads, PROMPT_TOKENS, config.head_size)
        feeds = {
            "hidden": rng.standard_normal((texts, 1, length, config.hidden), np.float32),
            "mask": np.ones((1, length), bool),
            "prefix_keys": rng.standard_normal(shape, np.float32),
            "prefix_values": rng.standard_normal(shape, np.float32),
        }
        found[kind] = profile(graph, feeds)
    return found


def profile(graph: Path, feeds: dict[str, np.ndarray]) -> dict[str, float]:
    """Share of each operator's kernels in the whole, those above half a percent."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for _ in range(PROFILED):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    total = sum(spent.values())
    return {name: round(s / total, 3) for name, s in spent.most_common() if s >= 0.005 * total}


@one_line_errors()
def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MP2_DATA"))
    parser.add_argument("--shape", nargs="+", default=["mini", "1024"], choices=["mini", "1024"])
    parser.add_argument("--task", help="default: lcqmc with --data, else demo_sentiment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", type=Path, default=Path("engines"), help="where engine folders are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = args.task or ("lcqmc" if args.data else "demo_sentiment")
    for shape in args.shape:
        row = compare(shape, task, args.data, args.rounds, args.engines)
        print(f"{shape} {task} {row['n_examples']} examples, ms an evaluation, one thread", flush=True)
        for name, engine in row["engines"].items():
            print(
                f"  {name:20} {engine['micro_batch_tokens']:5} tokens  stage I {engine['stage1_ms']:8.2f}  "
                f"stage II {engine['stage2_ms']:8.2f}  loss error {engine['loss_error']:.1e}"
            )
        for name, shares in row["operators"].items():
            print(f"  {name}: " + ", ".join(f"{kind} {100 * s:.1f} %" for kind, s in shares.items()))
        print("written:", save(f"onnx_operators_{shape}", [row]))


if __name__ == "__main__":
    main()

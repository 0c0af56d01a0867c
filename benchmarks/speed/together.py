"""Several seeds of a task as one against the same seeds one after another, in one run.

Two figures a task, kind of prompts and backbone shape, medians of ``--rounds`` in which both take turns:

    engine  ms an evaluation (one candidate on the whole few-shot set) over a round of stage-II visits of all
            seeds' objectives: each fetched before the next is launched, against all launched before any is
            fetched. What the device gains by having several runs' kernels side by side, no optimizer in it.
    runs    seconds of whole runs, journal, CMA-ES, dev and test included: ``mp2 bbt --seed`` a seed at a time
            against ``--seeds``, with the model loaded once for both.

``same`` counts results that are the same to the last bit: losses of the engine, and of runs the selected
prompt's bytes with all losses and scores. On a CPU, where evaluations are computed one after another, the
engine's ratio is about 1; that is what the command does without a GPU.

    python -m benchmarks.speed.together [--data DIR] [--task NAME ...] [--kind deep shallow]
        [--shape mini cpt-large] [--seeds 8,13,21,42,100] [--device auto] [--precision auto]
        [--iters 400] [--rounds 3]

Without --data the embedded demo tasks. Shapes are those of benchmarks.speed.engine_work: ``mini`` is the
embedded backbone and its prompts, others have random weights. About 4 minutes on one core for the defaults.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from benchmarks.speed.engine_work import INTRINSIC_DIM, PROMPT_TOKENS, SHAPES, make_backbone, synchronize
from mp2.commands.options import read_seeds
from mp2.engine import Objective, create_backend
from mp2.optimizers.config import RouterConfig
from mp2.prompts import load_prompts, random_prompts
from mp2.runs.config import BbtConfig
from mp2.runs.frozen_model import FrozenModel
from mp2.runs.run import make_problem
from mp2.runs.series import start_series
from mp2.runs.together import AT_ONCE

POPULATION = 20


def load(shape: str, kind: str, device: str, precision: str) -> FrozenModel:
    """The backbone of a shape, its prompts and the runtime."""
    backbone = make_backbone(shape)
    prompts = (
        load_prompts(f"mini-{kind}", backbone)
        if shape == "mini"
        else random_prompts(backbone, kind, prompt_tokens=PROMPT_TOKENS, intrinsic_dim=INTRINSIC_DIM)  # type: ignore[arg-type]
    )
    runtime = create_backend("torch", backbone, device=device, precision=precision)
    return FrozenModel(backbone, prompts, runtime)


def engine_figures(model: FrozenModel, configs: Sequence[BbtConfig], rounds: int) -> dict[str, Any]:
    """Visits of all layers by populations of 20, fetched one by one and after all were launched."""
    objectives = [make_problem(config, model).objective for config in configs]
    n_lanes = min(len(objectives), AT_ONCE, *(o.side_by_side() for o in objectives))
    model.backend.share(n_lanes)
    space = model.space()
    z = space.fuse(np.ones((space.n_layers, space.n_modules), dtype=bool))
    rng = np.random.default_rng(0)
    moves = rng.standard_normal((len(objectives), POPULATION, space.n_dims)).astype(np.float32)

    def visits(evaluate: Callable[[list[Objective], int], list[np.ndarray]]) -> tuple[float, np.ndarray]:
        for objective in objectives:
            objective.set_incumbent(z)
        synchronize()
        start = time.perf_counter()
        found = []
        for layer in range(space.n_layers):
            found.append(evaluate(objectives, layer))
            for objective, move in zip(objectives, moves, strict=True):
                objective.commit(layer, z[layer] + np.float32(1e-2) * move[0])
        return time.perf_counter() - start, np.array(found)

    def candidates(k: int, layer: int) -> np.ndarray:
        return z[layer] + np.float32(1e-2) * moves[k]

    def alone(these: list[Objective], layer: int) -> list[np.ndarray]:
        return [o.layer_losses(layer, candidates(k, layer)).fetch() for k, o in enumerate(these)]

    def together(these: list[Objective], layer: int) -> list[np.ndarray]:
        pending = [o.layer_losses(layer, candidates(k, layer)) for k, o in enumerate(these)]
        return [p.fetch() for p in pending]

    for _ in range(3):  # run, recorded, replayed
        visits(alone)
    times: dict[str, list[float]] = {"alone": [], "together": []}
    losses = {}
    for k in range(rounds):
        for name, evaluate in (("alone", alone), ("together", together))[:: -1 if k % 2 else 1]:
            spent, losses[name] = visits(evaluate)
            times[name].append(spent)
    n_evaluations = len(objectives) * POPULATION * space.n_layers
    ms = {name: 1e3 * median(spent) / n_evaluations for name, spent in times.items()}
    same = (losses["alone"] == losses["together"]).all(axis=(0, 2))
    return {
        "lanes": n_lanes,
        "alone_ms": round(ms["alone"], 4),
        "together_ms": round(ms["together"], 4),
        "ratio": round(ms["alone"] / ms["together"], 3),
        "same": int(np.count_nonzero(same)),
    }


def run_figures(model: FrozenModel, configs: Sequence[BbtConfig], rounds: int) -> dict[str, Any]:
    """Whole runs, one after another and as one."""
    times: dict[str, list[float]] = {"alone": [], "together": []}
    found: dict[str, list[tuple[object, ...]]] = {}
    groups_of = [("alone", [[config] for config in configs]), ("together", [list(configs)])]
    for k in range(rounds):
        for name, groups in groups_of[:: -1 if k % 2 else 1]:
            with TemporaryDirectory() as folder:
                start = time.perf_counter()
                results = [
                    result for group in groups for result in start_series(group, Path(folder), model=model)
                ]
                times[name].append(time.perf_counter() - start)
                found[name] = [_comparable(result) for result in results]
    seconds = {name: median(spent) for name, spent in times.items()}
    return {
        "alone_s": round(seconds["alone"], 3),
        "together_s": round(seconds["together"], 3),
        "ratio": round(seconds["alone"] / seconds["together"], 3),
        "same": sum(a == b for a, b in zip(found["alone"], found["together"], strict=True)),
    }


def _comparable(result: dict[str, Any]) -> tuple[object, ...]:
    names = ("train_loss", "dev_score", "test_score", "router", "best_train_loss", "selected", "stages")
    prompt = Path(result["run_dir"], "prompt.safetensors").read_bytes()
    return (*(result[name] for name in names), prompt)


def compare(model: FrozenModel, configs: Sequence[BbtConfig], rounds: int) -> dict[str, Any]:
    """Both figures of a task's seeds."""
    device = str(model.backend.device)
    return {
        "task": configs[0].task,
        "kind": model.kind,
        "backbone": model.backbone.name,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "precision": model.backend.precision,
        "seeds": [config.seed for config in configs],
        "iterations": configs[0].iters,
        "engine": engine_figures(model, configs, rounds),
        "runs": run_figures(model, configs, rounds),
    }


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    engine, runs, n = row["engine"], row["runs"], len(row["seeds"])
    return (
        f"{row['backbone']:14} {row['task']:16} {row['kind']:8} {n} seeds, {engine['lanes']} lanes  "
        f"engine {engine['alone_ms']:.3f} / {engine['together_ms']:.3f} ms = {engine['ratio']:.2f} "
        f"(same {engine['same']} of {n})  runs {runs['alone_s']:.2f} / {runs['together_s']:.2f} s = "
        f"{runs['ratio']:.2f} (same {runs['same']} of {n})"
    )


@one_line_errors()
def main() -> None:
    """Compare everything, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("MP2_DATA"))
    parser.add_argument("--task", nargs="+", default=["demo_sentiment"])
    parser.add_argument("--kind", nargs="+", default=["deep", "shallow"], choices=["deep", "shallow"])
    parser.add_argument("--shape", nargs="+", default=["mini"], choices=["mini", *SHAPES])
    parser.add_argument("--seeds", default="8,13,21,42,100")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--iters", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--test-limit", type=int, default=200)
    parser.add_argument("--name", default="together", help="of the JSON in benchmarks/results")
    args = parser.parse_args()
    rows = []
    for shape in args.shape:
        for kind in args.kind:
            model = load(shape, kind, args.device, args.precision)
            for task in args.task:
                one = BbtConfig(
                    task=task,
                    data=args.data,
                    backbone=shape,
                    prompts="random" if shape != "mini" else f"mini-{kind}",
                    kind=kind,
                    head="span",
                    iters=args.iters,
                    router=RouterConfig(iterations=min(100, args.iters // 2)),
                    test_limit=args.test_limit,
                    baselines=False,
                    device=args.device,
                )
                configs = [replace(one, seed=seed) for seed in read_seeds(None, args.seeds)]
                rows.append(compare(model, configs, args.rounds))
                print(line(rows[-1]), flush=True)
    print("written:", save(args.name, rows))


if __name__ == "__main__":
    main()

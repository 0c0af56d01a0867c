"""Speed of the engine, per backbone shape, task and runtime, beside a plain PyTorch loop and the machine.

For each: ms an iteration in stage I (all layers, populations of 20 routers) and at every layer of stage II;
tokens a second (stage I); necessary FLOP/s (`benchmarks.engine_work.necessary_flops`) and their share of the
float32 matrix rate measured in the same run (int8 can exceed 1); peak memory; ratio to the plain loop, which
takes turns with the engines layer by layer (medians of ``--rounds``); and, where the precision is not fp32,
how losses of one population agree with fp32. The first call of everything is left out (it packs weights and
compiles). One "iteration" is one candidate on the whole few-shot set.

    python -m benchmarks.throughput --data DIR [--shape mini 256 1024 large] [--task ...]
        [--engine torch:fp32 torch:int8 onnxruntime:fp32] [--device cuda] [--growth]

``large`` (24 x 1024, the shape of cpt-large, 16 examples) takes about ten minutes a task and engine on two
cores; the default shapes about 20 minutes for all. ``--growth`` measures cost against the number of
examples, length, population and layers instead, and draws throughput_growth.png; it can be cut into pieces
by ``--minutes``, each going on where the last one ended (five minutes in all for two engines on one core).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from benchmarks.command import one_line_errors
from benchmarks.engine_work import (
    INTRINSIC_DIM,
    PROMPT_TOKENS,
    SHAPES,
    Engine,
    make_backbone,
    matrix_rate,
    necessary_flops,
    peak_memory_mb,
    reset_peak_memory,
    seconds,
    task_inputs,
)
from benchmarks.plain_loop import PlainLoop
from benchmarks.provenance import save
from mp2.backbone import Backbone
from mp2.engine import create_objective
from mp2.engine.select import AnyObjective
from mp2.prompts import PromptSet, load_prompts, random_prompts
from mp2.tasks import MrcInput

POPULATION = 20


class Subject:
    """One engine under measurement."""

    def __init__(self, engine: Engine, objective: AnyObjective, z: np.ndarray) -> None:
        self.engine = engine
        self.objective = objective
        self.stage1_s: list[float] = []
        self.stage2_s: list[list[float]] = [[] for _ in z]
        self.peak_mb = 0.0
        objective.set_incumbent(z)


def compare(
    shape: str,
    task: str,
    engines: Sequence[Engine],
    rounds: int,
    device: str,
    data: Path | None,
    folder: Path,
) -> list[dict[str, Any]]:
    """Time all ``engines`` and the plain loop on one backbone shape and task, taking turns."""
    backbone = make_backbone(shape)
    config = backbone.config
    prompts = random_prompts(
        backbone, "deep", prompt_tokens=PROMPT_TOKENS, intrinsic_dim=INTRINSIC_DIM, seed=1
    )
    inputs = task_inputs(task, backbone, data, None if shape == "mini" else SHAPES[shape][3])
    rng = np.random.default_rng(0)
    size = (config.n_layers, INTRINSIC_DIM)
    z = rng.standard_normal(size).astype(np.float32)
    moves = rng.standard_normal((POPULATION, INTRINSIC_DIM)).astype(np.float32)
    routers = rng.random((POPULATION, *prompts.z.shape[:2])) < 0.5
    plain = PlainLoop(backbone, prompts, inputs, device)
    subjects = []
    for engine in engines:
        subject = Subject(engine, engine.objective(backbone, prompts, inputs, device, folder), z)
        if device == "cpu":  # from layer 0 every layer is prepared
            subject.objective.layer_losses(0, z[0] + moves[:2])
        else:  # the second time records CUDA graphs
            for _ in range(2):
                for layer in range(config.n_layers):
                    _visit(subject, layer, z[layer] + moves, device)
                subject.objective.router_losses(routers)
        subjects.append(subject)
    plain.loss(z)
    plain_s, rates = [], []
    for _ in range(rounds):
        rates.append(matrix_rate(device, subjects[0].objective.runtime.precision))
        for layer in range(config.n_layers):
            plain_s.append(seconds(lambda: plain.loss(z)))
            for subject in subjects:
                subject.stage2_s[layer].append(_visit(subject, layer, z[layer] + moves, device))
        for subject in subjects:
            subject.stage1_s.append(seconds(lambda s=subject: s.objective.router_losses(routers)))  # type: ignore[misc]
    lengths = [x.n_tokens for x in inputs]
    rows = []
    agreements = agreement(shape, backbone, prompts, inputs, subjects)
    for subject, agreed in zip(subjects, agreements, strict=True):
        stage1 = median(subject.stage1_s) / POPULATION
        layers = [median(times) / POPULATION for times in subject.stage2_s]
        rate = median(rates)
        full = necessary_flops(config, lengths, config.n_layers, shared_text=False)
        upper = [
            necessary_flops(config, lengths, config.n_layers - layer, shared_text=True)
            for layer in range(config.n_layers)
        ]
        rows.append(
            {
                "shape": shape,
                "layers": config.n_layers,
                "hidden": config.hidden,
                "task": task,
                "runtime": subject.objective.runtime.name,
                "precision": subject.objective.runtime.precision,
                "device": device,
                "n_examples": len(inputs),
                "mean_tokens": round(mean(lengths), 1),
                "max_tokens": max(lengths),
                "plain_ms": round(1e3 * median(plain_s), 2),
                "stage1_ms": round(1e3 * stage1, 2),
                "stage2_ms": round(1e3 * mean(layers), 2),
                "stage2_layer_ms": [round(1e3 * s, 2) for s in layers],
                "stage1_ratio": round(median(plain_s) / stage1, 2),
                "stage2_ratio": round(median(plain_s) / mean(layers), 2),
                "tokens_per_s": round(sum(lengths) / stage1),
                "matrix_gflops": round(rate / 1e9, 1),
                "stage1_gflops": round(full / stage1 / 1e9, 1),
                "stage1_share": round(full / stage1 / rate, 3),
                "stage2_gflops": round(sum(upper) / sum(layers) / 1e9, 1),
                "stage2_share": round(sum(upper) / sum(layers) / rate, 3),
                "peak_mb": round(subject.peak_mb),
                **agreed,
            }
        )
    return rows


def _visit(subject: Subject, layer: int, candidates: np.ndarray, device: str) -> float:
    """Time of one population at ``layer`` and of making the best the incumbent."""

    def work() -> None:
        losses = subject.objective.layer_losses(layer, candidates)
        subject.objective.commit(layer, candidates[int(np.argmin(losses))])

    reset_peak_memory(device)
    spent = seconds(work)
    subject.peak_mb = max(subject.peak_mb, peak_memory_mb(device))
    return spent


def agreement(
    shape: str,
    backbone: Backbone,
    prompts: PromptSet,
    inputs: Sequence[MrcInput],
    subjects: Sequence[Subject],
) -> list[dict[str, float]]:
    """Of one population's losses with the first engine's, if that one is fp32, for those that are not.

    The population is as stage II has it: around the fused embedded prompts (``mini``) with the step size of
    the upper layers, 1e-2; around random ones with a step that makes losses differ.
    """
    step = 1.0
    if shape == "mini":
        prompts, step = load_prompts("mini-deep", backbone), 1e-2
    z = prompts.fuse(torch.ones(prompts.z.shape[:2], dtype=torch.bool)).numpy()
    layer = backbone.config.n_layers // 2
    moves = np.random.default_rng(1).standard_normal((POPULATION, z.shape[1]))
    candidates = (z[layer] + step * moves).astype(np.float32)
    found: list[dict[str, float]] = []
    exact = np.empty(0)
    for number, subject in enumerate(subjects):
        runtime = subject.objective.runtime
        if number and (runtime.precision == "fp32" or not len(exact)):
            found.append({})
            continue
        objective = create_objective(runtime, backbone, prompts, inputs)
        objective.set_incumbent(z)
        losses = objective.layer_losses(layer, candidates)
        if not number:
            exact = losses if runtime.precision == "fp32" else exact
            found.append({})
            continue
        ranks = [x.argsort().argsort() for x in (losses, exact)]
        found.append(
            {
                "spearman": round(float(np.corrcoef(*ranks)[0, 1]), 5),
                "loss_error": float(f"{np.abs(losses - exact).max() / exact.mean():.2g}"),
                "loss_spread": float(f"{np.ptp(exact) / exact.mean():.2g}"),
            }
        )
    return found


@one_line_errors()
def main() -> None:
    """Measure what is asked for, print a table, write JSON (and curves)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MP2_DATA"))
    parser.add_argument("--shape", nargs="+", default=["mini", "256", "1024"], choices=["mini", *SHAPES])
    parser.add_argument("--task", nargs="+")
    parser.add_argument("--engine", nargs="+", default=["torch:fp32", "torch:int8", "onnxruntime:fp32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3, help="the medians of so many; 1 at width 1024")
    parser.add_argument("--growth", action="store_true", help="cost against size instead")
    parser.add_argument("--minutes", type=float, default=60.0, help="of --growth, then what is left is left")
    parser.add_argument("--work", type=Path, default=Path("runs/growth"), help="points of --growth done")
    parser.add_argument("--engines", type=Path, default=Path("engines"), help="where engine folders are kept")
    parser.add_argument("--name", default="throughput", help="name of the result files")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    engines = [Engine.parse(text) for text in args.engine]
    if args.growth:
        from benchmarks.throughput_growth import measure

        done = measure(engines, args.device, args.engines, args.name, args.work, args.minutes)
        if done:
            print("written:", *done)
        return
    tasks = args.task or (["tnews", "lcqmc"] if args.data else ["demo_topic", "demo_sentiment"])
    head = (
        f"{'shape':>6} {'task':15} {'engine':18} {'plain ms':>9} {'stage I':>8} {'stage II':>9} {'ratio':>6}"
    )
    print(f"{head} {'share':>6} {'MB':>6} {'Spearman':>8}", flush=True)
    for shape in args.shape:
        rows = []
        for task in tasks:
            rounds = args.rounds if shape in ("mini", "256") or args.device != "cpu" else 1
            rows += compare(shape, task, engines, rounds, args.device, args.data, args.engines)
            for row in rows[-len(engines) :]:
                name = f"{row['runtime']}:{row['precision']}"
                print(
                    f"{shape:>6} {task:15} {name:18} {row['plain_ms']:9.1f} {row['stage1_ms']:8.1f} "
                    f"{row['stage2_ms']:9.1f} {row['stage2_ratio']:6.2f} {row['stage1_share']:6.2f} "
                    f"{row['peak_mb']:6} {row.get('spearman', '')!s:>8}",
                    flush=True,
                )
        suffix = "" if args.device == "cpu" else "_cuda"
        print("written:", save(f"{args.name}_{shape}{suffix}", rows))


if __name__ == "__main__":
    main()

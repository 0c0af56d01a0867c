"""Growth curves of `benchmarks.throughput`: cost of stage II against each size, the others held.

Random backbones 256 wide and random texts of one length; the base case is 4 layers, 16 examples of 64
tokens, a population of 20. Cost is ms an evaluation, mean over the layers visited. Points are measured one
by one and kept, so that a measurement that ends can go on. On one thread of a CPU it is the thread's own time
that counts, which other processes do not lengthen.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from benchmarks.engine_work import (
    INTRINSIC_DIM,
    PROMPT_TOKENS,
    Engine,
    random_inputs,
    shaped_backbone,
    synchronize,
)
from benchmarks.forward_parts import clock
from benchmarks.plain_loop import PlainLoop
from benchmarks.provenance import RESULTS, save
from mp2.prompts import random_prompts

BASE = {"examples": 16, "tokens": 64, "population": 20, "layers": 4}
CURVES = {
    "examples": (1, 4, 16, 64),
    "tokens": (16, 32, 64, 128, 256, 448),
    "population": (1, 2, 5, 10, 20, 40),
    "layers": (1, 2, 4, 8, 12),
}


def measure(
    engines: Sequence[Engine], device: str, folder: Path, name: str, work: Path, minutes: float
) -> tuple[Path, Path] | None:
    """Measure what is left of all curves; the paths of the JSON and of the picture, once nothing is left.

    Points are kept in ``work`` as they are done; none is begun when ``minutes`` are over, and then None is
    returned.
    """
    settings = [clock_name(device), device, torch.get_num_threads(), [str(engine) for engine in engines]]
    tag = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    work.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + 60 * minutes
    rows, n_left = [], 0
    for axis, values in CURVES.items():
        for value in values:
            file = work / f"{tag}-{axis}-{value}.json"
            if not file.is_file():
                if time.perf_counter() > end:
                    n_left += 1
                    continue
                row = point({**BASE, axis: value}, engines, device, folder)
                file.write_text(json.dumps({"axis": axis, "value": value, **row}) + "\n", "utf-8")
                print(axis, value, row["ms"], flush=True)
            rows.append(json.loads(file.read_text("utf-8")))
    if n_left:
        print(f"{n_left} points are left; run it again", flush=True)
        return None
    return save(f"{name}_growth", rows), draw(rows, RESULTS / f"{name}_growth.png")


def point(size: dict[str, int], engines: Sequence[Engine], device: str, folder: Path) -> dict[str, Any]:
    """Ms an evaluation of every engine and of the plain loop for one size."""
    backbone = shaped_backbone(size["layers"], 256, 8)
    prompts = random_prompts(
        backbone, "deep", prompt_tokens=PROMPT_TOKENS, intrinsic_dim=INTRINSIC_DIM, seed=1
    )
    inputs = random_inputs(size["examples"], size["tokens"], backbone.config.vocab_size)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((size["layers"], INTRINSIC_DIM)).astype(np.float32)
    candidates = rng.standard_normal((size["population"], INTRINSIC_DIM)).astype(np.float32)
    cost = {}
    for engine in engines:
        objective = engine.objective(backbone, prompts, inputs, device, folder)
        objective.set_incumbent(z)
        times = []
        # cost falls by the same from each layer to the next: the mean over all is that of the first and last
        for layer in sorted({0, size["layers"] - 1}):
            objective.layer_losses(layer, candidates[:2] if device == "cpu" else candidates)
            times.append(_seconds(lambda o=objective, i=layer: o.layer_losses(i, candidates), device))  # type: ignore[misc]
        cost[f"{engine.runtime}:{engine.precision}"] = round(1e3 * mean(times) / size["population"], 3)
    plain = PlainLoop(backbone, prompts, inputs, device)
    plain.loss(z)
    cost["plain loop"] = round(1e3 * median(_seconds(lambda: plain.loss(z), device) for _ in range(3)), 3)
    return {**size, "clock": clock_name(device), "ms": cost}


def clock_name(device: str) -> str:
    """Whose seconds count."""
    return "the thread's" if device == "cpu" and torch.get_num_threads() == 1 else "the wall's"


def _seconds(work: Callable[[], object], device: str) -> float:
    now = clock if device == "cpu" else time.perf_counter
    synchronize()
    start = now()
    work()
    synchronize()
    return now() - start


def draw(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Four panels, both axes logarithmic."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for panel, axis in zip(panels.flat, CURVES, strict=True):
        own = [row for row in rows if row["axis"] == axis]
        for name in own[0]["ms"]:
            panel.plot([row["value"] for row in own], [row["ms"][name] for row in own], "o-", label=name)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms an evaluation")
        panel.set_xticks([row["value"] for row in own], [str(row["value"]) for row in own])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0, 0].legend()
    base = ", ".join(f"{value} {axis}" for axis, value in BASE.items())
    figure.suptitle(f"Stage II, width 256; held where not varied: {base}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path

"""Growth curves of `benchmarks.speed.throughput`: cost of stage II against each size, the others held.

Random backbones 256 wide and random texts of one length; the base case is 4 layers, 16 examples of 64
tokens, a population of 20. Cost is ms an evaluation, mean over the layers visited. Each round visits every
point once, so that drift hits all alike, and a point's cost is its median over the rounds, shown with the
least and the most; the base point is one point of all curves. In every other round the turns within a point
are in the opposite order. A visit of a point is kept, so that a measurement that ends can go on. On one
thread of a CPU it is the thread's own time that counts, which other processes do not lengthen. The plain loop
and the rivals A, B and C (`benchmarks.speed.rivals`; ``--no-rivals`` leaves these out) are measured as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from benchmarks.provenance import RESULTS, save
from benchmarks.speed.engine_work import (
    INTRINSIC_DIM,
    PROMPT_TOKENS,
    Engine,
    matrix_dtype,
    random_inputs,
    shaped_backbone,
    synchronize,
)
from benchmarks.speed.forward_parts import clock
from benchmarks.speed.plain_loop import PlainLoop
from benchmarks.speed.rivals import RIVALS, Rival
from benchmarks.speed.rounds import Pieces, spread
from mp2.prompts import random_prompts

PLAIN = "plain loop"
BASE = {"examples": 16, "tokens": 64, "population": 20, "layers": 4}
CURVES = {
    "examples": (1, 4, 16, 64),
    "tokens": (16, 32, 64, 128, 256, 448),
    "population": (1, 2, 5, 10, 20, 40),
    "layers": (1, 2, 4, 8, 12),
}


def measure(
    engines: Sequence[Engine],
    device: str,
    folder: Path,
    name: str,
    work: Path,
    minutes: float,
    n_rounds: int,
    rivals: bool = True,
) -> tuple[Path, Path] | None:
    """Measure what is left of all curves; the paths of the JSON and of the picture, once nothing is left.

    Visits of points are kept in ``work`` as they are done; none is begun when ``minutes`` are over, and then
    None is returned.
    """
    settings = ["growth", clock_name(device), device, [str(engine) for engine in engines], rivals]
    pieces = Pieces(work, settings, minutes)
    sizes = {axis: [{**BASE, axis: value} for value in values] for axis, values in CURVES.items()}
    times: dict[str, list[dict[str, Any]]] = {_name(size): [] for own in sizes.values() for size in own}
    size_of = {_name(size): size for own in sizes.values() for size in own}
    for number in range(n_rounds):
        for point_name, size in size_of.items():
            record = pieces.get(
                f"{point_name}-{number}",
                lambda size=size, number=number: {"ms": point(size, engines, device, folder, rivals, number)},  # type: ignore[misc]
            )
            if record is not None:
                times[point_name].append(record["ms"])
        print(f"round {number + 1} of {n_rounds}", flush=True)
    if pieces.n_left:
        print(f"{pieces.n_left} visits of points are left; run it again", flush=True)
        return None
    rows = []
    for axis, own in sizes.items():
        for size in own:
            measured = times[_name(size)]
            ms = {subject: spread([found[subject] for found in measured], 3) for subject in measured[0]}
            rows.append({"axis": axis, "value": size[axis], **size, "clock": clock_name(device), "ms": ms})
    return save(f"{name}_growth", rows), draw(rows, RESULTS / f"{name}_growth.png")


def _name(size: dict[str, int]) -> str:
    return "-".join(f"{axis}{value}" for axis, value in size.items())


def point(
    size: dict[str, int], engines: Sequence[Engine], device: str, folder: Path, rivals: bool, number: int
) -> dict[str, float]:
    """Ms an evaluation of every engine, the plain loop and ``rivals`` for one size, in round ``number``."""
    backbone = shaped_backbone(size["layers"], 256, 8)
    prompts = random_prompts(
        backbone, "deep", prompt_tokens=PROMPT_TOKENS, intrinsic_dim=INTRINSIC_DIM, seed=1
    )
    inputs = random_inputs(size["examples"], size["tokens"], backbone.config.vocab_size)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((size["layers"], INTRINSIC_DIM)).astype(np.float32)
    candidates = rng.standard_normal((size["population"], INTRINSIC_DIM)).astype(np.float32)

    dtype = matrix_dtype(device, engines[0].precision)
    # cost falls by the same from each layer to the next: the mean over all is that of the first and last
    ends = sorted({0, size["layers"] - 1})

    def engine_s(engine: Engine) -> float:
        objective = engine.objective(backbone, prompts, inputs, device, folder)
        objective.set_incumbent(z)
        times = []
        for layer in ends:
            objective.layer_losses(layer, candidates[:2] if device == "cpu" else candidates).fetch()
            times.append(_seconds(lambda i=layer: objective.layer_losses(i, candidates).fetch(), device))  # type: ignore[misc]
        return mean(times) / size["population"]

    def plain_s() -> float:
        plain = PlainLoop(backbone, prompts, inputs, device, dtype)
        plain.loss(z)
        return median(_seconds(lambda: plain.loss(z), device) for _ in range(3))

    made: list[Rival] = []

    def rival_s(kind: str) -> float:
        rival = Rival(kind, backbone, prompts, inputs, device, dtype, like=made[0] if made else None)
        made.append(rival)
        rival.set_incumbent(z)
        some = candidates[:1] if kind == "A" else candidates
        times = []
        for layer in ends if kind == "C" else ends[:1]:  # elsewhere the cost of A and B is the same
            rival.layer_losses(layer, some[:1])  # C: what is below is kept from here on
            times.append(_seconds(lambda i=layer: rival.layer_losses(i, some), device))  # type: ignore[misc]
        return mean(times) / len(some)

    turns: dict[str, Callable[[], float]] = {PLAIN: plain_s}
    turns |= {kind: lambda kind=kind: rival_s(kind) for kind in RIVALS if rivals}  # type: ignore[misc]
    turns |= {str(engine): lambda engine=engine: engine_s(engine) for engine in engines}  # type: ignore[misc]
    names = list(reversed(turns)) if number % 2 else list(turns)
    return {name: round(1e3 * turns[name](), 4) for name in names}


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
    """Four panels, both axes logarithmic: medians, bars from the least to the most."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for panel, axis in zip(panels.flat, CURVES, strict=True):
        own = [row for row in rows if row["axis"] == axis]
        for name in sorted(own[0]["ms"]):
            found = [row["ms"][name] for row in own]
            middle = [x["median"] for x in found]
            bars = [[x["median"] - x["min"] for x in found], [x["max"] - x["median"] for x in found]]
            panel.errorbar([row["value"] for row in own], middle, bars, fmt="o-", capsize=3, label=name)
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

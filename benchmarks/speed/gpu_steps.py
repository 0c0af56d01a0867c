"""The steps of `benchmarks.speed.gpu`; each says what it finds in lines of the ledger."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.provenance import SOURCE_SHA256, processor
from benchmarks.speed.engine_work import matrix_rate, necessary_flops, seconds, synchronize, task_inputs
from benchmarks.speed.gpu_layers import kernel_table, layer_parts
from benchmarks.speed.gpu_reference import (
    PARITY_LAYERS,
    TABLE4_TASKS,
    Scale,
    make_backbone,
    make_inputs,
    make_prompts,
    parity_head,
    parity_losses,
    probe,
)
from benchmarks.speed.table4_render import PAPER, PUBLISHED
from mp2.backbone import Backbone, load_backbone
from mp2.engine import Objective
from mp2.engine.agreement import spearman
from mp2.engine.cuda.backend import CUDA_PRECISIONS, CudaBackend
from mp2.engine.cuda.forward import PackedForward
from mp2.engine.cuda.linear import Fp8Linear, quantize_rows
from mp2.optimizers.config import LayerConfig
from mp2.prompts import PromptSet, load_prompts
from mp2.tasks import MrcInput

_HALVES = ("fp16", "bf16", "fp8")
# times the error that the same precision has on a CPU; float32's is all from the order of sums, and even so
# far from what TF32 or a half precision would do
_MORE = {"fp32": 16.0, "fp16": 4.0, "bf16": 4.0, "fp8": 4.0}
_RUNS = 5  # the paper's seeds


class Bench:
    """What all steps share: the device, the one backbone and its prompts, the ledger."""

    def __init__(self, device: str, scale: Scale, reference: Path, ledger: Callable[..., None]) -> None:
        self.device, self.scale, self.ledger = device, scale, ledger
        self.on_gpu = device != "cpu"
        with np.load(reference) as file:
            self.reference = dict(file)
        self.rates: dict[str, float] = {}

    @cached_property
    def backbone(self) -> Backbone:
        """The random backbone."""
        return make_backbone(self.scale)

    @cached_property
    def prompts(self) -> PromptSet:
        """Its prompts."""
        return make_prompts(self.scale, self.backbone)

    def inputs(self) -> list[MrcInput]:
        """The batch that one shape is timed on."""
        n, tokens = self.scale.examples
        return make_inputs([tokens] * n, self.backbone.config.vocab_size)

    def engine(self, precision: str, **flags: bool) -> CudaBackend:
        """The CUDA engine over the backbone."""
        return CudaBackend(self.backbone, device=self.device, precision=precision, **flags)

    def incumbent(self) -> np.ndarray:
        """Fused intrinsic prompts [L, d] of the untuned router."""
        z: np.ndarray = self.prompts.z.mean(1).numpy()
        return z

    def population(self, seed: int) -> np.ndarray:
        """Candidates [P, L, d]: steps of stage II's first sizes around the incumbent."""
        z, rng = self.incumbent(), np.random.default_rng(seed)
        sigmas = np.array([LayerConfig().sigma(layer, "deep") for layer in range(len(z))])
        steps = rng.standard_normal((self.scale.population, *z.shape))
        return (z + sigmas[:, None] * steps).astype(np.float32)

    def rate(self, precision: str) -> float:
        """FLOP/s of the precision's matrix product, measured once."""
        if precision not in self.rates:
            if precision == "fp8":
                self.rates[precision] = _fp8_rate(self.device, self.scale.matrix_size)
            else:
                self.rates[precision] = matrix_rate(self.device, precision, self.scale.matrix_size)
        return self.rates[precision]

    def precisions(self) -> list[str]:
        """Below float32, those that this device has."""
        found = []
        for precision in _HALVES:
            try:
                if precision == "fp8":
                    self.rate(precision)
                found.append(precision)
            except RuntimeError as error:
                self.ledger(precision=precision, missing=str(error).splitlines()[0])
        return found


def _fp8_rate(device: str, size: int) -> float:
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    rows, scale = quantize_rows(x)
    product = Fp8Linear(x, x[0], lambda x: (rows, scale))  # the product alone
    product(x)
    return 2 * size**3 / seconds(lambda: product(x), 5)


def _once(objective: Objective, work: Callable[[], Any]) -> float:
    """Seconds of ``work``, its results on the host."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def environment(bench: Bench) -> None:
    """Versions, matrix rates in TFLOP/s, and the memory's rate in GB/s."""
    triton = importlib.util.find_spec("triton")
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if triton is not None:
        import triton as library

        found["triton"] = library.__version__
    if bench.on_gpu:
        device = torch.cuda.get_device_properties(0)
        found |= {
            "device": device.name,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "capability": f"{device.major}.{device.minor}",
            "driver": torch._C._cuda_getDriverVersion()
            if hasattr(torch._C, "_cuda_getDriverVersion")
            else None,
        }
    here = [name for name in ("cma", "transformers", "onnxruntime") if importlib.util.find_spec(name)]
    bench.ledger(**found, cpu=processor(), source_sha256=SOURCE_SHA256, here=here)
    rates = {name: round(bench.rate(name) / 1e12, 3) for name in ["fp32", *bench.precisions()]}
    bench.ledger(matrix_tflops=rates, size=bench.scale.matrix_size)
    x = torch.empty(1 << (30 if bench.on_gpu else 20), dtype=torch.uint8, device=bench.device)
    y = torch.empty_like(x)
    bench.ledger(copy_gb_s=round(2 * x.numel() / seconds(lambda: y.copy_(x), 5) / 1e9, 1))


def prepare(bench: Bench) -> None:
    """Make the backbone and its prompts."""
    z, config = bench.incumbent(), bench.backbone.config
    bench.ledger(backbone=config.name, heads_of=config.head_size, prompts=list(z.shape))


def parity(bench: Bench) -> None:
    """Raise AssertionError where losses are off, nothing was recorded or a kernel is not the fast one."""
    scale, reference = bench.scale, bench.reference
    here = probe(bench.backbone, bench.prompts)
    np.testing.assert_allclose(here, reference["probe"], rtol=1e-4, atol=1e-6, err_msg="other random weights")
    inputs = make_inputs(scale.lengths, bench.backbone.config.vocab_size)
    exact, wrong = reference["losses"], []
    for precision in ["fp32", *bench.precisions()]:
        engine = bench.engine(precision)
        forward = engine.forward(bench.prompts, parity_head(bench.prompts))
        assert isinstance(forward, PackedForward)
        objective = Objective(forward, inputs)
        errors = []
        for _ in range(3):  # run, recorded, replayed
            losses = parity_losses(objective, reference["candidates"], scale.n_layers)
            errors.append(float(np.abs(losses - exact).max()))
        most = _MORE[precision] * float(reference.get(f"error_{precision}", np.inf))
        ranks = [round(spearman(a, b), 4) for a, b in zip(losses, exact, strict=True)]
        bench.ledger(
            precision=precision,
            notes=engine.notes,
            error=[float(f"{x:.3g}") for x in errors],
            allowed=float(f"{most:.3g}"),
            spread=[float(f"{x:.3g}") for x in np.ptp(exact, axis=1)],
            spearman=ranks,
            n_recorded=forward.graphs.n_recorded,
        )
        if not max(errors) <= most:
            wrong.append(f"{precision} is off by {max(errors):.2g}, expected at most {most:.2g}")
        if bench.on_gpu:
            attention = "plain" if precision == "fp32" else "flash"
            if engine.kernels.name != attention or engine.steps.name != "triton":
                wrong.append(f"{precision} has {engine.notes}, expected attention {attention}, steps triton")
            if not forward.graphs.n_recorded:
                wrong.append(f"{precision}: no CUDA graph was recorded")
    if wrong:
        raise AssertionError("; ".join(wrong))


def large(bench: Bench) -> None:
    """Share of the matrix rate over all layers, and how losses of visits are ordered, in each precision."""
    n, tokens = bench.scale.examples
    n_layers = bench.scale.n_layers
    flops = necessary_flops(bench.backbone.config, [tokens] * n, n_layers, bench.scale.prompt_tokens)
    flops *= bench.scale.population
    z, candidates = bench.incumbent(), bench.population(0)
    visited = sorted({0, n_layers // 2, n_layers - 1})
    exact: dict[int, np.ndarray] = {}
    for precision in ["fp32", *bench.precisions()]:
        objective = Objective(bench.engine(precision).forward(bench.prompts), bench.inputs())
        objective.set_incumbent(z)
        losses = {layer: objective.layer_losses(layer, candidates[:, layer]).fetch() for layer in visited}
        if precision == "fp32":
            exact = losses
            continue
        times = [
            _once(objective, lambda: objective.full_losses(candidates).fetch())  # noqa: B023 - called now
            for _ in range(2 + bench.scale.rounds)
        ][2:]
        spent, rate = median(times), bench.rate(precision)
        bench.ledger(
            precision=precision,
            evaluation_ms=round(1e3 * spent / bench.scale.population, 4),
            tflops=round(flops / spent / 1e12, 2),
            share_of_matrix_rate=round(flops / spent / rate, 3),
            range_ms=[round(1e3 * x / bench.scale.population, 4) for x in (min(times), max(times))],
            spearman={layer: round(spearman(losses[layer], exact[layer]), 4) for layer in visited},
            spread={layer: float(f"{np.ptp(exact[layer]):.2g}") for layer in visited},
        )


def table4(bench: Bench) -> None:
    """Deep stage II as the published code does it, over texts of the tasks' lengths; then its rivals."""
    for precision in [p for p in ("fp16", "fp8") if p in bench.precisions()]:
        engine = bench.engine(precision)
        for task in TABLE4_TASKS:
            if f"lengths_{task}" not in bench.reference:
                bench.ledger(task=task, missing="its lengths; write the reference with --data")
                continue
            _stage_two(bench, engine, task)
    for task in TABLE4_TASKS:
        if f"lengths_{task}" in bench.reference:
            _rivals(bench, task)


def _stage_two(bench: Bench, engine: CudaBackend, task: str) -> None:
    scale, z = bench.scale, bench.incumbent()
    lengths = bench.reference[f"lengths_{task}"].tolist()
    objective = Objective(
        engine.forward(bench.prompts), make_inputs(lengths, bench.backbone.config.vocab_size)
    )
    ask, tell, how = _search(bench)
    objective.set_incumbent(z)
    n_done, started, spent = 0, time.perf_counter(), 0.0
    try:
        for _ in range(scale.generations):
            for layer in range(scale.n_layers):
                offsets = ask(layer)
                before = time.perf_counter()
                losses = objective.layer_losses(layer, (z[layer] + offsets).astype(np.float32)).fetch()
                spent += time.perf_counter() - before
                tell(layer, offsets, losses)
                best = offsets[int(losses.argmin())]
                objective.commit(layer, (z[layer] + best).astype(np.float32))
                n_done += len(offsets)
    finally:  # at a deadline, too
        wall, paper = time.perf_counter() - started, PAPER["deep"][task]
        bench.ledger(
            task=task,
            precision=engine.precision,
            examples=len(lengths),
            mean_tokens=round(float(np.mean(lengths)), 1),
            search=how,
            evaluations=n_done,
            evaluation_ms=round(1e3 * spent / max(1, n_done), 3),
            minutes=round(wall / 60, 3),
            recording_s=round(objective.forward.graphs.record_s, 2),
            paper_evaluation_ms=round((paper[1] - paper[0]) * 6e4 / PUBLISHED["deep"], 1),
        )


def _search(bench: Bench) -> tuple[Callable[[int], Any], Callable[..., None], str]:
    """Return ask, tell and what they are: CMA-ES a layer, or steps of its first size where cma is missing."""
    z, config = bench.incumbent(), LayerConfig(popsize=bench.scale.population)
    sigmas = [config.sigma(layer, "deep") for layer in range(len(z))]
    if importlib.util.find_spec("cma") is None:
        rng, shape = np.random.default_rng(0), (bench.scale.population, z.shape[1])
        return (
            lambda layer: sigmas[layer] * rng.standard_normal(shape),
            lambda layer, offsets, losses: None,
            "random steps: cma is not here; the engine's time is the same, its own is missing",
        )
    from mp2.optimizers.cma_layers import layer_searches

    searches = layer_searches(sigmas, z.shape[1], config, np.random.SeedSequence(0))
    return (
        lambda layer: searches[layer].ask(),
        lambda layer, offsets, losses: searches[layer].tell(offsets, losses),
        "CMA-ES",
    )


def _rivals(bench: Bench, task: str) -> None:
    """The plain loop and rivals A, B and C in fp16, and what compiling gains two of them.

    Rivals are timed at the first, the middle and the last layer: in a round of visits C runs half the layers.
    """
    from benchmarks.speed.plain_loop import PlainLoop
    from benchmarks.speed.rivals import Rival

    inputs = make_inputs(bench.reference[f"lengths_{task}"].tolist(), bench.backbone.config.vocab_size)
    z, candidates = bench.incumbent(), bench.population(0)
    shared = (bench.backbone, bench.prompts, inputs, bench.device, torch.float16)

    def tell(rival: str, times: list[float], n: int = 1) -> None:
        bench.ledger(task=task, rival=f"{rival}, fp16", evaluation_ms=round(1e3 * median(times) / n, 3))

    loop = PlainLoop(*shared)
    loop.loss(z)
    tell("plain loop", [seconds(lambda: loop.loss(z)) for _ in range(bench.scale.rounds)])
    for kind, compiled in (("C", False), ("B", False), ("A", False), ("C", True)):
        if compiled and not bench.on_gpu:
            continue
        rival = Rival(kind, *shared, compiled=compiled)
        visited = (0, len(z) // 2, len(z) - 1)

        def visits(rival: Rival = rival, visited: Sequence[int] = visited) -> None:
            rival.set_incumbent(z)
            for layer in visited:
                rival.layer_losses(layer, candidates[:, layer])

        visits()
        times = [seconds(visits) for _ in range(min(3, bench.scale.rounds))]
        tell(kind + (" compiled" if compiled else ""), times, len(visited) * len(candidates))


def profile(bench: Bench) -> None:
    """The 25 longest kernels of a population through all layers, and what each part of a layer takes."""
    for precision in [p for p in ("fp16", "fp8") if p in bench.precisions()]:
        engine = bench.engine(precision)
        forward = engine.forward(bench.prompts)
        assert isinstance(forward, PackedForward)
        objective = Objective(forward, bench.inputs())
        candidates = bench.population(0)
        objective.full_losses(candidates).fetch()
        bench.ledger(
            precision=precision, parts_ms=layer_parts(engine, forward, bench.inputs(), candidates[:, 0])
        )
        objective.full_losses(candidates).fetch()  # recorded
        rows = kernel_table(
            lambda: objective.full_losses(candidates).fetch(),  # noqa: B023 - called now
            on_gpu=bench.on_gpu,
        )
        for row in rows[:25]:
            bench.ledger(precision=precision, **row)


def flags(bench: Bench) -> None:
    """What each change behind a flag gains, in alternating rounds, and how it orders candidates."""
    z, candidates = bench.incumbent(), bench.population(0)
    layer = bench.scale.n_layers // 2
    choices: dict[str, dict[str, bool]] = {
        "as it is": {},
        "one kernel": {"one_kernel": True},
        "fused activation": {"fused_activation": True},
        "both": {"one_kernel": True, "fused_activation": True},
    }
    for precision in [p for p in ("fp16", "fp8") if p in bench.precisions()]:
        objectives: dict[str, Objective] = {}
        losses: dict[str, np.ndarray] = {}
        for name, chosen in choices.items():
            try:
                objective = Objective(
                    bench.engine(precision, **chosen).forward(bench.prompts), bench.inputs()
                )
                for _ in range(3):
                    objective.full_losses(candidates).fetch()
                objective.set_incumbent(z)
                losses[name] = objective.layer_losses(layer, candidates[:, layer]).fetch()
                objectives[name] = objective
            except Exception as error:  # of one change; the others are measured
                bench.ledger(precision=precision, flags=name, error=f"{type(error).__name__}: {error}"[:500])
        times: dict[str, list[float]] = {name: [] for name in objectives}
        for k in range(bench.scale.rounds):
            for name in list(objectives)[:: -1 if k % 2 else 1]:
                run = objectives[name]
                times[name].append(_once(run, lambda run=run: run.full_losses(candidates).fetch()))  # type: ignore[misc]
        for name, spent in times.items():
            ratios = [a / b for a, b in zip(times["as it is"], spent, strict=True)]
            bench.ledger(
                precision=precision,
                flags=name,
                evaluation_ms=round(1e3 * median(spent) / bench.scale.population, 4),
                speed=[round(f(ratios), 3) for f in (median, min, max)],
                spearman=round(spearman(losses[name], losses["as it is"]), 4),
                largest_difference=float(f"{np.abs(losses[name] - losses['as it is']).max():.2g}"),
            )


def mini(bench: Bench) -> None:
    """Rounds of visits over the embedded backbone: one run, and five one after another and side by side."""
    backbone = load_backbone("mini")
    prompts = load_prompts("mini-deep", backbone)
    z = prompts.z.mean(1).numpy()
    rng = np.random.default_rng(0)
    moves = 1e-2 * rng.standard_normal((_RUNS, bench.scale.population, z.shape[1]))
    inputs = task_inputs("demo_sentiment", backbone, None, None)
    for precision in [p for p in ("fp16", "bf16") if p in bench.precisions()]:
        engine = CudaBackend(backbone, device=bench.device, precision=precision)
        # other examples for each, as of several seeds
        sets = [
            [x for k, x in enumerate(inputs) if k % 7 != run][: bench.scale.n_mini] for run in range(_RUNS)
        ]
        objectives = [Objective(engine.forward(prompts), own) for own in sets]
        n_lanes = min(len(objectives), objectives[0].side_by_side())
        engine.share(n_lanes)

        def visits(these: Sequence[int], together: bool) -> np.ndarray:
            for k in these:
                objectives[k].set_incumbent(z)  # noqa: B023 - called in this turn of the loop
            found = []
            for layer in range(len(z)):
                asked = [objectives[k].layer_losses for k in these]  # noqa: B023
                arguments = [(layer, (z[layer] + moves[k]).astype(np.float32)) for k in these]
                if together:
                    pending = [ask(*x) for ask, x in zip(asked, arguments, strict=True)]
                    found += [p.fetch() for p in pending]
                else:
                    found += [ask(*x).fetch() for ask, x in zip(asked, arguments, strict=True)]
            return np.array(found)

        everyone = range(_RUNS)
        ways = {"one": ([0], False), "five by turns": (everyone, False), "five together": (everyone, True)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        same: dict[str, np.ndarray] = {}
        for k in range(3 + bench.scale.rounds):
            for name, (these, together) in list(ways.items())[:: -1 if k % 2 else 1]:
                synchronize()
                start = time.perf_counter()
                same[name] = visits(these, together)
                if k >= 3:  # run, recorded, replayed
                    times[name].append(time.perf_counter() - start)
        for name, (these, _) in ways.items():
            n = len(these) * len(z) * bench.scale.population
            bench.ledger(
                precision=precision,
                runs=name,
                lanes=n_lanes,
                evaluation_ms=round(1e3 * median(times[name]) / n, 5),
                same_bits=bool(np.array_equal(same["five by turns"], same["five together"])),
            )


STEPS: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "environment": (10, environment),
    "prepare": (30, prepare),
    "parity": (40, parity),
    "large": (70, large),
    "table4": (120, table4),
    "profile": (40, profile),
    "flags": (60, flags),
    "mini": (50, mini),
}
"""Name -> deadline in seconds, and the step."""

assert set(_HALVES) < set(CUDA_PRECISIONS)
assert PARITY_LAYERS == 2

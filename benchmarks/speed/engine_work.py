"""What the speed benchmarks measure: an engine on few-shot inputs, its necessary work, its peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from mp2.backbone import Backbone, BackboneConfig, load_backbone, random_backbone
from mp2.engine import Objective, create_backend
from mp2.prompts import PromptSet, load_prompts, random_prompts
from mp2.tasks import MrcFormatter, MrcInput, few_shot_split, load_card, load_examples

SEED = 42
PROMPT_TOKENS, INTRINSIC_DIM = 50, 300  # m and d of the paper


@dataclass(frozen=True)
class Shape:
    """A backbone of random weights and the mini's vocabulary, and how much of the work is measured on it."""

    layers: int
    hidden: int
    heads: int
    most_examples: int | None = None  # of the few-shot set; None: all
    pairs: bool = False  # a round visits two layers, the k-th from below and from above: the mean of all
    routers: int = 20  # of a population in stage I


SHAPES = {
    "256": Shape(4, 256, 8),
    "1024": Shape(6, 1024, 16, most_examples=8, pairs=True, routers=5),
    "cpt-large": Shape(24, 1024, 16, most_examples=4, pairs=True, routers=5),
}
MINI_PAPER = "mini-m50"  # the embedded backbone with as many prompt tokens as the paper's
# Root mean squares of trained deep prompts (fused, and their projections; the mini of before). Freshly made
# projections are 16 times smaller; a step of stage II would then change a loss by little more than float32
# rounds it.
TRAINED_Z, TRAINED_PROJECTION = 0.14, 0.20


def make_backbone(shape: str) -> Backbone:
    """The embedded backbone (``mini``, ``mini-m50``) or a random one."""
    if shape in ("mini", MINI_PAPER):
        return load_backbone("mini")
    own = SHAPES[shape]
    return shaped_backbone(own.layers, own.hidden, own.heads)


def shaped_backbone(n_layers: int, hidden: int, n_heads: int) -> Backbone:
    """A random backbone with the mini's vocabulary."""
    mini = load_backbone("mini")
    config = BackboneConfig(
        name=f"random-{n_layers}x{hidden}",
        n_layers=n_layers,
        hidden=hidden,
        n_heads=n_heads,
        ffn=4 * hidden,
        vocab_size=mini.config.vocab_size,
        max_positions=512,
    )
    return random_backbone(config, mini.tokenizer.tokens(), seed=0)


def make_prompts(shape: str, backbone: Backbone) -> PromptSet:
    """Deep prompts: the embedded ones (``mini``: m = 16, d = 64), else random with the paper's m and d.

    Random ones are of the size of trained ones, so that the paper's step sizes mean what they mean there.
    """
    if shape == "mini":
        return load_prompts("mini-deep", backbone)
    prompts = random_prompts(
        backbone, "deep", prompt_tokens=PROMPT_TOKENS, intrinsic_dim=INTRINSIC_DIM, scale=TRAINED_Z, seed=1
    )
    fused = prompts.z * prompts.meta.n_modules**0.5  # a mean over K is that much smaller than each
    size = prompts.projection.pow(2).mean().sqrt()
    return replace(prompts, z=fused, projection=prompts.projection * (TRAINED_PROJECTION / size))


def task_inputs(task: str, backbone: Backbone, data: Path | None, limit: int | None) -> list[MrcInput]:
    """The few-shot training set of ``task``, the first ``limit`` of it."""
    card = load_card(task)
    train = few_shot_split(card, load_examples(card, "train", data), SEED).train[:limit]
    formatter = MrcFormatter(card, backbone.tokenizer, backbone.config.max_positions - PROMPT_TOKENS)
    return [formatter.training_input(example, i) for i, example in enumerate(train)]


def random_inputs(n_examples: int, n_tokens: int, vocab_size: int) -> list[MrcInput]:
    """Examples of one length."""
    rng = np.random.default_rng(0)
    spans = np.empty((0, 2), np.int64)
    return [
        MrcInput(
            example=i,
            input_ids=rng.integers(5, vocab_size, n_tokens),
            start=0,
            end=n_tokens - 1,
            option_spans=spans,
        )
        for i in range(n_examples)
    ]


@dataclass(frozen=True)
class Engine:
    """A runtime in a precision, as ``torch:int8``."""

    runtime: str
    precision: str

    @classmethod
    def parse(cls, text: str) -> Engine:
        """``RUNTIME`` or ``RUNTIME:PRECISION``."""
        runtime, _, precision = text.partition(":")
        return cls(runtime, precision or "auto")

    def __str__(self) -> str:
        return f"{self.runtime}:{self.precision}"

    def objective(
        self, backbone: Backbone, prompts: PromptSet, inputs: Sequence[MrcInput], device: str, engines: Path
    ) -> Objective:
        """The few-shot objective; an engine folder that is missing is exported first."""
        folder = None
        if self.runtime.startswith("onnxruntime"):
            from mp2.export import export_engine

            folder = engines / backbone.name
            if not folder.is_dir():
                export_engine(backbone, folder)
        runtime = create_backend(
            self.runtime, backbone, engine_dir=folder, device=device, precision=self.precision
        )
        return Objective(runtime.forward(prompts), inputs)


def necessary_flops(config: BackboneConfig, lengths: Sequence[int], n_layers: int, prompt_tokens: int) -> int:
    """FLOPs of one candidate of a population through ``n_layers`` layers, the first of them a text's first.

    Products of real tokens and attention, no padding. A token costs 2 (4 H^2 + 2 H F) for the linear layers
    and 4 (T + m) H for attention over text and prefix. At the first of the layers, the layer under visit in
    stage II and layer 0 in stage I, the text is the same for the whole population: its queries, keys, values
    and text-text products are needed once for all candidates, and are not counted at all.
    """
    width = config.hidden
    total = 0
    for t in lengths:
        layer = 2 * t * (4 * width * width + 2 * width * config.ffn) + 4 * t * (t + prompt_tokens) * width
        shared = 2 * t * 3 * width * width + 4 * t * t * width
        total += n_layers * layer - shared
    return total


def seconds(work: Callable[[], object], runs: int = 1) -> float:
    """Median time of ``work``."""
    times = []
    for _ in range(runs):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_memory(device: str) -> None:
    """Start `peak_memory_mb` anew (on a CPU: Linux only, elsewhere the peak is the process's)."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_mb(device: str) -> float:
    """Peak of the process's resident memory, or of torch's memory on the GPU, since the last reset."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def matrix_dtype(device: str, precision: str) -> torch.dtype:
    """Type of the product that a precision is held against: float32 on a CPU, on a GPU its own.

    For fp8, of which torch has no plain product, it is bf16.
    """
    own = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
    return torch.float32 if device == "cpu" else own.get(precision, torch.float32)


def matrix_rate(device: str, precision: str, size: int = 1536, runs: int = 5) -> float:
    """FLOP/s of a square matrix product in `matrix_dtype` (median)."""
    size = size if device == "cpu" else 8192
    dtype = matrix_dtype(device, precision)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds(lambda: a @ b)
    return 2 * size**3 / seconds(lambda: a @ b, runs)

"""What the speed benchmarks measure: an engine on few-shot inputs, its necessary work, its peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from mp2.backbone import Backbone, BackboneConfig, load_backbone, random_backbone
from mp2.engine import create_objective, create_runtime
from mp2.engine.select import AnyObjective
from mp2.prompts import PromptSet
from mp2.tasks import MrcFormatter, MrcInput, few_shot_split, load_card, load_examples

SEED = 42
PROMPT_TOKENS, INTRINSIC_DIM = 50, 300  # m and d of the paper
SHAPES = {  # layers, hidden, heads, largest number of examples; random weights, the mini's vocabulary
    "256": (4, 256, 8, None),
    "1024": (6, 1024, 16, 16),
    "large": (24, 1024, 16, 16),
}


def make_backbone(shape: str) -> Backbone:
    """The embedded backbone (``mini``) or a random one."""
    if shape == "mini":
        return load_backbone("mini")
    return shaped_backbone(*SHAPES[shape][:3])


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

    def objective(
        self, backbone: Backbone, prompts: PromptSet, inputs: Sequence[MrcInput], device: str, engines: Path
    ) -> AnyObjective:
        """The few-shot objective; an engine folder that is missing is exported first."""
        folder = None
        if self.runtime.startswith("onnxruntime"):
            from mp2.export import export_engine

            folder = engines / backbone.name
            if not folder.is_dir():
                export_engine(backbone, folder)
        runtime = create_runtime(
            self.runtime, backbone, engine_dir=folder, device=device, precision=self.precision
        )
        return create_objective(runtime, backbone, prompts, inputs)


def necessary_flops(
    config: BackboneConfig, lengths: Sequence[int], n_layers: int, *, shared_text: bool
) -> int:
    """FLOPs of one candidate through ``n_layers`` layers: products of real tokens and attention, no padding.

    A token costs 2 (4 H^2 + 2 H F) for the linear layers and 4 (T + m) H for attention over text and prefix.
    With ``shared_text`` the first of the layers has its text's q, k, v and text-text attention from the
    population, and they are not counted at all.
    """
    width, m = config.hidden, PROMPT_TOKENS
    total = 0
    for t in lengths:
        layer = 2 * t * (4 * width * width + 2 * width * config.ffn) + 4 * t * (t + m) * width
        shared = 2 * t * 3 * width * width + 4 * t * t * width
        total += n_layers * layer - (shared if shared_text else 0)
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


def matrix_rate(device: str, precision: str, size: int = 1536, runs: int = 5) -> float:
    """FLOP/s of a square matrix product: float32 on a CPU, the precision's own type on a GPU (median)."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}.get(precision)
    on_gpu = device != "cpu"
    size = 8192 if on_gpu else size
    a, b = (
        torch.randn(size, size, device=device, dtype=dtype if on_gpu else torch.float32) for _ in range(2)
    )
    seconds(lambda: a @ b)
    return 2 * size**3 / seconds(lambda: a @ b, runs)

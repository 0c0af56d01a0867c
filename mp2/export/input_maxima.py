"""How large the inputs of the linear layers get, on real text: the scales of a float8 engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from mp2.backbone import Backbone, Layer
from mp2.errors import UsageError
from mp2.tasks import MrcFormatter, MrcInput, few_shot_split, load_card, load_examples

if TYPE_CHECKING:
    from pathlib import Path

    from mp2.prompts import PromptSet

TASKS = ("demo_sentiment", "demo_topic")  # embedded, so that every export has text to calibrate on
HEADROOM = 2.0  # float8's relative precision does not depend on the scale; texts to come may be larger
_LINEARS = {  # input of a stored linear layer -> the encoder's module that reads the same input
    "qkv": "query",
    "attention_output": "attention_output",
    "intermediate": "intermediate",
    "output": "output",
}


def task_inputs(backbone: Backbone, task: str, data: str | Path | None = None) -> list[MrcInput]:
    """Return the few-shot training set (seed 8) of ``task`` as ``backbone`` reads it."""
    card = load_card(task)
    formatter = MrcFormatter(card, backbone.tokenizer, backbone.config.max_positions)
    train = few_shot_split(card, load_examples(card, "train", data), seed=8).train
    return [formatter.training_input(example, k) for k, example in enumerate(train)]


def calibration_inputs(backbone: Backbone) -> list[MrcInput]:
    """Return the few-shot sets of the embedded tasks; random tokens where ``backbone`` cannot spell them."""
    inputs: list[MrcInput] = []
    for task in TASKS:
        try:
            inputs += task_inputs(backbone, task)
        except UsageError:
            continue
    return inputs or random_inputs(backbone)


def random_inputs(backbone: Backbone, n_examples: int = 16) -> list[MrcInput]:
    """Return sequences of random tokens and lengths with random spans."""
    rng = np.random.default_rng(8)
    longest = min(48, backbone.config.max_positions)
    inputs = []
    for example in range(n_examples):
        ids = rng.integers(0, backbone.config.vocab_size, int(rng.integers(longest // 2, longest + 1)))
        start = int(rng.integers(0, len(ids)))
        inputs.append(MrcInput(example, ids.astype(np.int64), start, start, np.empty((0, 2), np.int64)))
    return inputs


@torch.inference_mode()
def input_maxima(
    backbone: Backbone, inputs: Sequence[MrcInput], prompts: PromptSet | None = None
) -> dict[str, float]:
    """Return ``layers.<i>.<linear>`` -> `HEADROOM` times the largest input magnitude over ``inputs``.

    Deep ``prompts`` are all on and mixed as untuned; without them there is no prompt.
    """
    from mp2.prompts import PrefixProjector

    prefixes = None
    if prompts is not None and prompts.kind == "deep":
        projector = PrefixProjector(backbone.encoder, prompts)
        z = prompts.fuse(torch.ones(prompts.z.shape[:2]))
        prefixes = [projector.keys_values(i, z[i : i + 1]) for i in range(backbone.config.n_layers)]
    maxima: dict[str, float] = {}

    def see(name: str, largest: float) -> None:
        maxima[name] = max(maxima.get(name, 0.0), HEADROOM * largest)

    with _watched(backbone, see):
        for item in inputs:
            backbone.encoder(torch.from_numpy(item.input_ids)[None], None, prefixes)
    return maxima


@contextmanager
def _watched(backbone: Backbone, see: Callable[[str, float], None]) -> Iterator[None]:
    """Tell ``see`` the largest magnitude of every linear layer's input while the context lasts."""

    def hook(name: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        see(name, float(args[0].abs().max()))

    handles = []
    for index, layer in enumerate(backbone.encoder.layers):
        assert isinstance(layer, Layer)
        for name, module in _LINEARS.items():
            watch = partial(hook, f"layers.{index}.{name}")
            handles.append(getattr(layer, module).register_forward_pre_hook(watch))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

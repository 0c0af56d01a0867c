"""The tuned prompt: one fused intrinsic prompt a layer, with what is needed to use it again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mp2.errors import FormatError, MismatchError, UsageError
from mp2.files import write_bytes
from mp2.tensor_files import open_safetensors

if TYPE_CHECKING:
    from mp2.backbone import Backbone
    from mp2.heads import Head
    from mp2.prompts import PromptSet

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TunedMeta:
    """Where a tuned prompt comes from and what it fits."""

    task: str
    kind: str
    backbone: str
    backbone_sha256: str
    prompts: str
    prompts_sha256: str
    router: list[str]  # a string of 0 and 1 for each layer
    card: str  # the task card's text
    max_tokens: int
    at: str  # untuned | stage1 | stage2
    iteration: int
    seed: int
    head: dict[str, Any] = field(default_factory=lambda: {"kind": "span"})  # its tensors stand beside z
    temperature: float = 1.0  # scores are divided by it (`mp2.tasks.calibration`)
    schema_version: int = SCHEMA_VERSION


def head_tensors(head: Head) -> dict[str, NDArray[Any]]:
    """What a head that was fitted has to keep; others are made again from prompts and backbone."""
    from mp2.heads import FittedRidge

    return head.state() if isinstance(head, FittedRidge) else {}


def head_settings(head: Head) -> dict[str, Any]:
    """What a fitted head was fitted with, for the metadata."""
    from mp2.heads import FittedRidge

    return asdict(head.settings) if isinstance(head, FittedRidge) else {}


def tuned_head(
    path: Path, meta: TunedMeta, backbone: Backbone, prompts: PromptSet, words: Sequence[Sequence[int]]
) -> Head:
    """The head that a tuned prompt is read with; ``words``: token ids of the label words, for mlm.

    Raises:
        FormatError: no such head, or its tensors are not those of one.
        UsageError: the checkpoint has no masked-language-model head.
    """
    from safetensors.numpy import load_file

    from mp2.heads import FittedRidge, LabelWordHead, SpanHead

    kind = meta.head.get("kind")
    if kind == "span":
        return SpanHead(prompts.span_weight, prompts.span_bias)
    if kind == "mlm":
        if backbone.mlm_head is None:
            raise UsageError(
                f"the run reads answers by the masked-language-model head of backbone '{meta.backbone}', and "
                "this checkpoint has none"
            )
        return LabelWordHead(backbone.mlm_head, words)
    if kind == "ridge":
        try:
            return FittedRidge.from_state(meta.head, load_file(path))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"not a ridge head's: {error}", path=path, field="head") from error
    raise FormatError(f"is {kind!r}, expected span, mlm or ridge", path=path, field="head.kind")


def save_tuned(
    path: Path, z: NDArray[np.float32], meta: TunedMeta, head: Mapping[str, NDArray[Any]] | None = None
) -> None:
    """Write z [L', d], its metadata and its head's tensors; the same values always give the same bytes."""
    from safetensors.numpy import save

    # One key: safetensors keeps metadata in a hash map, whose order would vary from run to run.
    data = save(
        {"z": np.ascontiguousarray(z), **(head or {})},
        {"mp2": json.dumps(asdict(meta), ensure_ascii=False, sort_keys=True)},
    )
    write_bytes(path, data)


def load_tuned(path: Path) -> tuple[NDArray[np.float32], TunedMeta]:
    """Read a tuned prompt; raises ``FormatError`` if the file is not one."""
    if not path.exists():
        raise FormatError("no such file: the run has not ended, or lost it", path=path)
    if path.is_dir():
        raise FormatError("is a folder, expected the tuned prompt of the run, a file", path=path)
    with open_safetensors(path, "numpy") as file:
        text = (file.metadata() or {}).get("mp2")
        if text is None or "z" not in file.keys():  # noqa: SIM118 - not a dict
            raise FormatError("expected a tuned prompt (tensor z, metadata mp2)", path=path)
        z = file.get_tensor("z")
    try:
        meta = TunedMeta(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise FormatError(f"metadata is not a tuned prompt's: {error}", path=path, field="mp2") from error
    if meta.schema_version != SCHEMA_VERSION:
        raise FormatError(f"schema_version {meta.schema_version}, expected {SCHEMA_VERSION}", path=path)
    if not isinstance(meta.temperature, float) or not 0 < meta.temperature < math.inf:
        raise FormatError(
            f"is {meta.temperature!r}, expected a number above 0", path=path, field="temperature"
        )
    if z.ndim != 2 or z.dtype != np.float32:
        raise FormatError(f"{z.dtype} of shape {z.shape}, expected float32 [L', d]", path=path, field="z")
    return z, meta


def check_fits(meta: TunedMeta, *, backbone_sha256: str, prompts_sha256: str) -> None:
    """Raise ``MismatchError`` unless the backbone and the modular prompts are those it was tuned on."""
    pairs = (("backbone", meta.backbone, meta.backbone_sha256, backbone_sha256),)
    for what, name, expected, got in (*pairs, ("prompts", meta.prompts, meta.prompts_sha256, prompts_sha256)):
        if expected != got:
            raise MismatchError(
                f"the prompt was tuned on {what} '{name}' with sha256 {expected[:12]}, got sha256 {got[:12]};"
                f" give the {what} that the run's config.json names"
            )

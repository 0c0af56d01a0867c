"""The tuned prompt: one fused intrinsic prompt a layer, with what is needed to use it again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mp2.errors import FormatError, MismatchError, UsageError, shown
from mp2.files import json_bytes, write_bytes
from mp2.json_files import (
    Fields,
    Rule,
    WrongValue,
    check,
    dataclass_rule,
    number,
    one_line,
    one_of,
    parse_object,
    whole,
)
from mp2.tensor_files import open_safetensors

if TYPE_CHECKING:
    from mp2.backbone import Backbone
    from mp2.heads import Head
    from mp2.prompts import PromptSet
    from mp2.tasks import TaskCard

SCHEMA_VERSION = 1
_ROUTER = re.compile("[01]+")


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


_META: dict[str, Rule] = {
    **dict.fromkeys(("task", "backbone", "backbone_sha256", "prompts", "prompts_sha256", "at"), one_line),
    "schema_version": one_of(SCHEMA_VERSION),
    "kind": one_of("deep", "shallow"),
    "max_tokens": whole(1),
    "iteration": whole(),
    "seed": whole(),
    "head": Fields({"kind": one_of("span", "mlm", "ridge")}),
}


def _meta(value: Any, where: str) -> TunedMeta:
    """The rule of a tuned prompt's metadata."""
    meta: TunedMeta = dataclass_rule(TunedMeta)(value, where)
    for name, rule in _META.items():
        rule(getattr(meta, name), name)
    if meta.temperature <= 0:
        raise WrongValue("temperature", f"is {meta.temperature}, expected a number above 0")
    for at, layer in enumerate(meta.router):
        if not _ROUTER.fullmatch(layer):
            raise WrongValue(f"router[{at}]", f"is {shown(layer)}, expected a text of 0 and 1")
    return meta


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
        UsageError: the checkpoint has no masked-language-model head, or another one.
    """
    from mp2.heads import FittedRidge, LabelWordHead, SpanHead
    from mp2.heads.ridge import RidgeSettings

    kind = meta.head.get("kind")
    if kind == "span":
        return SpanHead(prompts.span_weight, prompts.span_bias)
    if kind == "mlm":
        if backbone.mlm_head is None:
            raise UsageError(
                f"the run reads answers by the masked-language-model head of backbone '{meta.backbone}', and "
                "this checkpoint has none"
            )
        tuned, here = meta.head.get("sha256"), backbone.mlm_head.sha256()
        if tuned not in (None, here):  # None: a run of before it was kept
            raise MismatchError(
                f"the run reads answers by the masked-language-model head {shown(str(tuned)[:12])} of "
                f"backbone '{meta.backbone}', and this checkpoint's is {here[:12]}: give the run's checkpoint"
            )
        return LabelWordHead(backbone.mlm_head, words)
    if kind == "ridge":
        known = [item.name for item in fields(RidgeSettings)]
        stored = {name: meta.head[name] for name in known if name in meta.head}
        chosen: RidgeSettings = check(stored, dataclass_rule(RidgeSettings), path, where="head")
        check(chosen.layer, whole(0, backbone.config.n_layers), path, where="head.layer")
        check(chosen.temperature, number(0), path, where="head.temperature")
        try:
            head = FittedRidge.from_state(meta.head, _head_arrays(path))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"not a ridge head's: {error}", path=path, field="head") from error
        n_rows, hidden = len(head.state_weight), backbone.config.hidden
        if not n_rows or n_rows % hidden:
            raise FormatError(
                f"has {n_rows} rows, expected a multiple of the hidden size {hidden}",
                path=path,
                field="ridge_state_weight",
            )
        return head
    raise FormatError(f"is {kind!r}, expected span, mlm or ridge", path=path, field="head.kind")


def _head_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors beside z; raises ``FormatError`` for other types than a head's, and for NaN."""
    arrays = {}
    with open_safetensors(path, "numpy") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            dtype = file.get_slice(name).get_dtype()
            if dtype not in ("F32", "F64", "I64"):
                raise FormatError(f"is {dtype}, expected F32, F64 or I64", path=path, field=name)
            arrays[name] = file.get_tensor(name)
            if not np.isfinite(arrays[name]).all():
                raise FormatError("holds NaN or infinity: a damaged prompt", path=path, field=name)
    return arrays


def save_tuned(
    path: Path, z: NDArray[np.float32], meta: TunedMeta, head: Mapping[str, NDArray[Any]] | None = None
) -> None:
    """Write z [L', d], its metadata and its head's tensors; the same values always give the same bytes."""
    from safetensors.numpy import save

    # One key: safetensors keeps metadata in a hash map, whose order would vary from run to run.
    data = save(
        {"z": np.ascontiguousarray(z), **(head or {})},
        {"mp2": json_bytes(asdict(meta), sort_keys=True).decode()},
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
        shape, dtype = file.get_slice("z").get_shape(), file.get_slice("z").get_dtype()
        if len(shape) != 2 or dtype != "F32":
            raise FormatError(f"is {dtype} of shape {shape}, expected F32 [L', d]", path=path, field="z")
        z = file.get_tensor("z")
    if not np.isfinite(z).all():
        raise FormatError("holds NaN or infinity: a damaged prompt", path=path, field="z")
    meta = check(parse_object(text, path, field="mp2"), _meta, path)
    if meta.router and len(meta.router) != len(z):
        raise FormatError(f"has {len(meta.router)} layers, z has {len(z)}", path=path, field="router")
    return z, meta


def run_card(run_dir: Path, meta: TunedMeta) -> TaskCard:
    """The task card in a run's folder; the one that the prompt was tuned with.

    Raises:
        MismatchError: it was changed since.
    """
    from mp2.tasks import load_card

    path = run_dir / "card.toml"
    card = load_card(path)
    if path.read_text(encoding="utf-8") != meta.card:
        raise MismatchError(
            f"{path} is not the card that the prompt was tuned with (prompt.safetensors has that): labels "
            "and words would not be those that it learned; put the card back, or tune again"
        )
    return card


def check_fits(meta: TunedMeta, z: NDArray[np.float32], prompts: PromptSet, *, backbone_sha256: str) -> None:
    """Raise ``MismatchError`` unless the backbone and the modular prompts are those it was tuned on."""
    prompts_sha256 = prompts.sha256
    pairs = (("backbone", meta.backbone, meta.backbone_sha256, backbone_sha256),)
    for what, name, expected, got in (*pairs, ("prompts", meta.prompts, meta.prompts_sha256, prompts_sha256)):
        if expected != got:
            raise MismatchError(
                f"the prompt was tuned on {what} '{name}' with sha256 {expected[:12]}, got sha256 {got[:12]};"
                f" give the {what} that the run's config.json names"
            )
    expected_shape = (prompts.z.shape[0], prompts.z.shape[2])
    if z.shape != expected_shape or meta.kind != prompts.kind:
        raise MismatchError(
            f"the tuned prompt is {meta.kind} of shape {z.shape}, expected {prompts.kind} of "
            f"{expected_shape} as of prompts '{meta.prompts}'"
        )

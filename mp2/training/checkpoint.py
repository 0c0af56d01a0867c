"""A training folder: its lock, its checkpoint, its journals cut back to it, and the folder as it was.

A checkpoint is one safetensors file, written whole or not at all, no pickles: parameters, Adam's moments, and
a JSON state (step, counters) in its metadata. Sampling needs no state: every random draw of step s comes from
a generator seeded with (seed, s).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mp2.errors import FormatError, UsageError
from mp2.files import json_bytes, write_bytes, write_tensors
from mp2.folder_lock import LOCK, folder_lock
from mp2.journal_lines import LineReader
from mp2.json_files import (
    Fields,
    JsonError,
    Rule,
    WrongValue,
    anything,
    check,
    null_or,
    number,
    object_of,
    parse_object,
    sha256,
    whole,
)
from mp2.tensor_files import open_safetensors
from mp2.text_files import check_file

_STATE = Fields(
    {
        **dict.fromkeys(("step", "skipped", "in_a_row"), whole()),
        **dict.fromkeys(("seconds", "waited_s"), number(0)),
        "settings": object_of(anything),
    },
    {"sha256": sha256, "before": object_of(number(0, 1))},
)
LOSS_LINE = Fields({"step": whole(1), "loss": null_or(number())})  # of a journal of losses
SCORES_LINE = Fields({"step": whole(), "scores": object_of(number(0, 1))})  # of dev scores


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a training folder, made if need be; it falls with the process, however that ends.

    Raises:
        RunLockedError: another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder, f"another process is training in {folder}; choose another --out"):
        yield


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Save what ``load_checkpoint`` needs to go on bit for bit."""
    tensors = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
    whole_state = {**state, "sha256": _digest(tensors, state)}
    # one key: safetensors keeps metadata in a hash map, whose order would vary from run to run
    write_tensors(path, tensors, {"state": json_bytes(whole_state).decode()})


def _digest(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> str:
    """SHA-256 of a checkpoint: its state and the bytes of all tensors."""
    digest = hashlib.sha256(json_bytes(dict(state), sort_keys=True))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoint_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint; raises ``FormatError`` for a file that is none."""
    with open_safetensors(path, expected="training checkpoint") as file:
        metadata = file.metadata() or {}
    if "state" not in metadata:
        raise FormatError("not a training checkpoint: it has no training state", path=path)
    state: dict[str, Any] = check(parse_object(metadata["state"], path, field="state"), _STATE, path)
    if not state["in_a_row"] <= state["skipped"] <= state["step"]:
        raise FormatError(
            f"{state['skipped']} steps were skipped of {state['step']}, {state['in_a_row']} of them in a row",
            path=path,
            field="skipped",
        )
    if state["waited_s"] > state["seconds"] or (state["step"] and not state["seconds"]):
        raise FormatError(
            f"is {state['seconds']}, for {state['step']} steps that waited {state['waited_s']} s for data",
            path=path,
            field="seconds",
        )
    return state


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore parameters and moments in place; return the JSON state.

    Raises:
        FormatError: damaged file, or a checkpoint of another model.
    """
    state = checkpoint_state(path)
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    written = state.pop("sha256", None)  # checkpoints of before have none
    if written is not None and _digest(tensors, state) != written:
        raise FormatError("is damaged: its checksum is not the one that was written", path=path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            what = "holds NaN or infinity" if tensor.is_floating_point() else f"is {tensor.dtype}"
            raise FormatError(f"tensor '{name}' {what}: a damaged checkpoint", path=path)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in parameters.items():
            saved = tensors.get(f"model.{name}")
            if saved is None or saved.shape != parameter.shape:
                got = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
                raise FormatError(
                    f"parameter '{name}' has {got}, expected shape {tuple(parameter.shape)}: "
                    "this checkpoint is of another model or configuration",
                    path=path,
                )
            parameter.copy_(saved)
    fused = {
        id(p) for g in optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]
    }
    for name, parameter in parameters.items():
        prefix = f"optimizer.{name}."
        moments = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        for key, value in moments.items():
            if value.shape not in ((), parameter.shape):
                raise FormatError(
                    f"'{prefix}{key}' has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}",
                    path=path,
                )
        if moments:  # Adam keeps ``step`` on the CPU, unless it is fused
            on_device = id(parameter) in fused
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if key != "step" or on_device else value
                for key, value in moments.items()
            }
    return state


def cut_back(
    path: Path, step: int, expected: Iterable[int], log: Callable[[str], None], rule: Rule = LOSS_LINE
) -> None:
    """Drop the lines of steps after ``step``, which are taken again, a torn last line, and damaged ones.

    The file is replaced whole. ``log`` hears which of the ``expected`` steps have no line: a checkpoint does
    not need them, but the curves will not have them either.
    """
    if path.is_symlink():
        raise UsageError(f"{path} is a symbolic link, and mp2 writes through none: put the file itself there")
    if not path.exists():
        lines: list[bytes] = []
    else:
        check_file(path)
        lines = path.read_bytes().split(b"\n")
    reader = LineReader()
    kept, found = [], set()
    for line in lines[:-1]:
        try:
            at = rule(reader.read(line), "")["step"]
        except (JsonError, WrongValue):
            continue
        if at <= step and reader.fault is None:
            kept.append(line + b"\n")
            found.add(at)
    if lines and (len(kept) < len(lines) - 1 or lines[-1]):
        write_bytes(path, b"".join(kept))
    missing = sorted(set(expected) - found)
    if missing:
        log(
            f"note: {path} lacks {len(missing):,} of the steps up to {step}, the first is {missing[0]}: "
            "they are in no curve"
        )


def read_steps(path: Path, rule: Rule = LOSS_LINE) -> list[dict[str, Any]]:
    """The lines of a journal of steps; raises ``FormatError`` for one that is not as it was written."""
    check_file(path)
    reader, lines = LineReader(), []
    for at, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            values = reader.read(line)
        except JsonError as error:
            raise FormatError(f"{error}; the journal was edited or damaged", path=path, line=at) from error
        lines.append(check(values, rule, path, line=at))
        if reader.fault is not None:
            raise FormatError(f"{reader.fault}; the journal was edited or damaged", path=path, line=at)
    return lines


class Preparation:
    """What a folder holds now, which may be nothing, or no folder at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._missing = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        self._before = set() if self._missing else set(self._folder.iterdir())

    @contextmanager
    def undone(self) -> Iterator[None]:
        """On a ``UsageError``, take out what the block put into the folder, and the folders made for it.

        Enter with the folder's lock held. What another process put there before it was ours stays.
        """
        theirs = {path for path in self._folder.iterdir() if path.name != LOCK}
        keep = self._before | theirs
        try:
            yield
        except UsageError:
            for path in set(self._folder.iterdir()) - keep:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            for folder in [] if theirs else self._missing:  # the deepest first
                folder.rmdir()
            raise

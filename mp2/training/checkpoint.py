"""A training folder: its lock, its checkpoint, its journals cut back to it, and the folder as it was.

A checkpoint is one safetensors file, written whole or not at all, no pickles: parameters, Adam's moments, and
a JSON state (step, counters) in its metadata. Sampling needs no state: every random draw of step s comes from
a generator seeded with (seed, s).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mp2.errors import FormatError, RunLockedError, UsageError
from mp2.files import write_tensors, write_text
from mp2.tensor_files import open_safetensors

LOCK = "lock"  # in every training folder


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a training folder, made if need be; it falls with the process, however that ends.

    Raises:
        RunLockedError: another process trains there.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunLockedError(f"another process is training in {folder}; choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Save what ``load_checkpoint`` needs to go on bit for bit."""
    tensors = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
    write_tensors(path, tensors, {"state": json.dumps(dict(state))})


def checkpoint_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint; raises ``FormatError`` for a file that is none."""
    with open_safetensors(path, expected="training checkpoint") as file:
        metadata = file.metadata() or {}
    if "state" not in metadata:
        raise FormatError("not a training checkpoint: it has no training state", path=path)
    try:
        state: dict[str, Any] = json.loads(metadata["state"])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not a training checkpoint: {error}", path=path) from error
    return state


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore parameters and moments in place; return the JSON state.

    Raises:
        FormatError: damaged file, or a checkpoint of another model.
    """
    state = checkpoint_state(path)
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
        if moments:  # Adam keeps ``step`` on the CPU, unless it is fused
            on_device = id(parameter) in fused
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if key != "step" or on_device else value
                for key, value in moments.items()
            }
    return state


def cut_back(path: Path, step: int, expected: Iterable[int], log: Callable[[str], None]) -> None:
    """Drop the lines of steps after ``step``, which are taken again, and a torn last line.

    The file is replaced whole. ``log`` hears which of the ``expected`` steps have no line: a checkpoint does
    not need them, but the curves will not have them either.
    """
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    found = [_step(line) for line in lines]
    kept = [line for line, at in zip(lines, found, strict=True) if at is not None and at <= step]
    if len(kept) < len(lines):
        write_text(path, "".join(kept))
    missing = sorted(set(expected) - set(found))
    if missing:
        log(
            f"note: {path} lacks {len(missing):,} of the steps up to {step}, the first is {missing[0]}: "
            "they are in no curve"
        )


def _step(line: str) -> int | None:
    """The step of a whole line; None for a torn one."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None


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

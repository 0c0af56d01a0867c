"""The journals of training runs: one JSON line a step, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from mp2.files import write_text


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

"""An example of a task, as every later step takes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """An answer in an extraction context: its text and the character at which it starts."""

    text: str
    start: int


@dataclass(frozen=True)
class Example:
    """One example; ``label`` is a raw label, the right option's index, or None (extraction, unlabelled)."""

    fields: dict[str, str]
    label: str | int | None
    options: tuple[str, ...] = ()
    answers: tuple[Answer, ...] = ()
    source_line: int = 0

"""What is wrong with a card or its data: one validator serves loading (the first) and checking (all).

The functions that read cards and examples report to a ``Faults`` sink:
``FirstFault`` raises at once, ``AllFaults`` keeps a list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mp2.errors import FormatError


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, and where."""

    message: str
    path: str
    line: int | None = None
    field: str | None = None

    def error(self) -> FormatError:
        """Return the error that loading raises for this fault."""
        return FormatError(self.message, path=self.path, line=self.line, field=self.field)

    def __str__(self) -> str:
        return str(self.error())


class Faults(Protocol):
    """Where a validator reports to."""

    def add(
        self, message: str, path: str | Path, *, line: int | None = None, field: str | None = None
    ) -> None:
        """Report one fault."""


class FirstFault:
    """Raises the first fault as a ``FormatError``."""

    def add(
        self, message: str, path: str | Path, *, line: int | None = None, field: str | None = None
    ) -> None:
        """Raise the fault."""
        raise Fault(message, str(path), line, field).error()


@dataclass
class AllFaults:
    """Keeps every fault in the order found."""

    found: list[Fault] = field(default_factory=list)

    def add(
        self, message: str, path: str | Path, *, line: int | None = None, field: str | None = None
    ) -> None:
        """Keep the fault."""
        self.found.append(Fault(message, str(path), line, field))


def grouped(faults: Sequence[Fault]) -> list[str]:
    """Return a line for each kind of fault: its first one, their number and the first three places."""
    kinds: dict[tuple[str, str | None, str], list[Fault]] = {}
    for fault in faults:
        kinds.setdefault((fault.path, fault.field, _kind(fault.message)), []).append(fault)
    lines = []
    for members in kinds.values():
        places = ", ".join(str(p.line) for p in members[:3])
        more = f" ({len(members)} such lines, first {places})" if len(members) > 1 else ""
        lines.append(f"{members[0]}{more}")
    return lines


# what `shown` has made: a text, whole or cut off; a list or dictionary without texts in it; another value
_TEXT = re.compile(r"""(?<!\w)'(?:\\.|[^'\\…])*(?:'|…)|(?<!\w)"(?:\\.|[^"\\…])*(?:"|…)""")
_INNERMOST = re.compile(r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}")
_CUT_OFF = re.compile(r"[\[{].*", re.DOTALL)
_VALUE = re.compile(r"\b(?:None|True|False)\b|-?\d[\d.e+-]*")


def _kind(message: str) -> str:
    """Return a message without the values that it shows."""
    kind = _TEXT.sub("", message)
    while (less := _INNERMOST.sub("", kind)) != kind:
        kind = less
    return _VALUE.sub("", _CUT_OFF.sub("", kind))

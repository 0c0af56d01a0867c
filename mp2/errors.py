"""Every error that mp2 raises on purpose.

::

    Mp2Error                    exit 1: the work failed
    ├── LossError               a whole generation of non-finite losses; the journal is whole
    ├── LostProcessError        another process of the same torchrun run ended; its checkpoint is whole
    ├── OutOfMemoryError        a single example does not fit
    └── UsageError              exit 2: what was asked for is wrong, nothing was done
        ├── UnknownNameError    no such task, backbone, runtime, method ... with the nearest names
        ├── MissingDependencyError  a package or library that must be installed first
        ├── FormatError         a file's content is not what its format says (file, line, field, expected)
        ├── MismatchError       two good files that do not belong together (prompts and backbone, ...)
        └── RunLockedError      another process works in this run folder
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class Mp2Error(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class LossError(Mp2Error):
    """A whole generation of candidates had non-finite losses."""


class LostProcessError(Mp2Error):
    """Another process of the same run ended, or never came."""


class OutOfMemoryError(Mp2Error):
    """A single example does not fit the device's memory."""


class UsageError(Mp2Error):
    """What was asked for cannot be done as asked."""

    exit_code = 2


class UnknownNameError(UsageError):
    """No such task, backbone, runtime, method or label."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        """Say which ``kind`` of thing ``name`` is not, and which ``known`` names come nearest."""
        names = list(known)
        name = name if len(name) <= 80 else f"{name[:79]}…"
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        message = f"unknown {kind} '{name}'."
        if near:
            message += " Did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
        if len(names) <= (4 if near else 20):
            message += " Known: " + ", ".join(names) + "."
        super().__init__(f"{message} {hint}".strip())


class MissingDependencyError(UsageError):
    """A package or library that this needs is not installed; the message says how to get it."""


class FormatError(UsageError):
    """A file's content is not what its format says."""

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        """Prefix ``message`` with ``path:line: field 'field':``, as far as they are known.

        Lines of a library's message become one.
        """
        message = " ".join(message.split("\n"))
        where = str(path) if path is not None else ""
        if line is not None:
            where += f":{line}"
        prefix = f"{where}: " if where else ""
        if field is not None:
            prefix += f"field '{field}': "
        super().__init__(prefix + message)


class MismatchError(UsageError):
    """Two good things that do not belong together, such as prompts and another backbone."""


class RunLockedError(UsageError):
    """Another process works in this run folder."""


def shown(value: object, limit: int = 40) -> str:
    """Return ``value`` as a message shows it: its repr, cut to ``limit`` characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # a value that nests itself too deep, an integer of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"

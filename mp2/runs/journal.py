"""The journal: an append-only JSONL file that is a run's log and its checkpoint at once.

Line 1 is the header (what ran: config hash, weight hashes, versions). Then events in the order they
happened::

    {"event": "losses", "stage": 2, "layer": 3, "iteration": 141, "of": [140, 160], "candidate": "9f..",
    "loss": .7} {"event": "scores", "split": "dev", "at": "stage2", "iteration": 160, "score": 0.8, "loss":
    0.4}

A generation is one line a candidate, written with one ``write`` and made durable with one ``fsync``;
``of`` says which iterations belong together, so that a torn generation is recognised. Opening for resumption
drops a torn last line and a torn last generation: they were in flight. Losses are JSON numbers with all 17
digits, ``null`` where not finite.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mp2.errors import FormatError, Mp2Error
from mp2.tasks.problems import shown

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Record:
    """One event as it was journaled: its lines, all of one generation or a single one."""

    lines: list[dict[str, Any]]

    @property
    def event(self) -> str:
        """``losses`` or ``scores``."""
        return str(self.lines[0]["event"])


class Journal:
    """Append-only. An append is written when it returns, and on the disk before the next one is written.

    So a run that is killed loses nothing that it appended, a power cut at most the last generation; the run
    goes on computing while the disk works.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mp2-fsync")
        self._syncing: Future[None] | None = None

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Write the lines of one event.

        Raises:
            Mp2Error: the system refused (full disk, ...); what was journaled before is safe.
        """
        data = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        try:
            self._settle()
            self._write(data.encode())
            self._syncing = self._pool.submit(os.fsync, self._file.fileno())
        except OSError as error:
            raise Mp2Error(
                f"cannot write {self.path}: {error.strerror or error}. Only the generation in flight is "
                f"lost: make room, then go on with: mp2 bbt --resume {self.path.parent}"
            ) from error

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]

    def _settle(self) -> None:
        """Wait until what was appended is on the disk."""
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def close(self) -> None:
        """Wait for the disk and close the file."""
        try:
            self._settle()
        finally:
            self._pool.shutdown()
            self._file.close()


def open_journal(path: Path, header: dict[str, Any]) -> tuple[Journal, dict[str, Any], list[Record]]:
    """The journal ready for appending, its header as it was first written, and the events it holds.

    A file that is not there yet, or was cut off in its first line, gets ``header``; torn ends are cut away.
    """
    recorded, records, whole = read_journal(path) if path.exists() else (None, [], 0)
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
    journal = Journal(path)
    if recorded is None:
        recorded = {"event": "header", "schema_version": SCHEMA_VERSION, **header}
        try:
            journal.append([recorded])
        except BaseException:
            journal.close()
            raise
    return journal, recorded, records


def read_journal(path: Path) -> tuple[dict[str, Any] | None, list[Record], int]:
    """The header (``None`` if it was torn), the whole events, and how many bytes these take.

    Raises:
        FormatError: a line that is not the last is not what a journal holds; the message names the field.
    """
    if path.is_dir():
        raise FormatError("is a folder, expected the run's journal, a file of JSON lines", path=path)
    data = path.read_bytes()
    header: dict[str, Any] | None = None
    records: list[Record] = []
    pending: list[dict[str, Any]] = []
    whole = position = 0
    lines = data.split(b"\n")
    for number, raw in enumerate(lines[:-1], start=1):
        position += len(raw) + 1
        line = _parse(raw)
        if line is None:
            if number == len(lines) - 1:
                break  # torn by a power cut: a line end without its content
            raise FormatError("not a JSON object; the journal was edited or damaged", path=path, line=number)
        if header is None:
            if line.get("event") != "header" or line.get("schema_version") != SCHEMA_VERSION:
                raise FormatError(
                    f"expected a journal header with schema_version {SCHEMA_VERSION}", path=path, line=number
                )
            _check(line, _HEADER, path, number)
            header = line
            whole = position
            continue
        event = line.get("event")
        _check(line, _EVENTS.get(str(event), {}), path, number)
        if event == "losses":
            first, last = line["of"]
            if line["iteration"] != first + 1 + len(pending):
                raise FormatError(
                    f"iteration {line['iteration']}, expected {first + 1 + len(pending)}",
                    path=path,
                    line=number,
                )
            pending.append(line)
            if line["iteration"] < last:
                continue
            records.append(Record(pending))
            pending = []
        elif event == "scores":
            if pending:
                raise FormatError("scores inside a generation", path=path, line=number)
            records.append(Record([line]))
        else:
            raise FormatError(f"event {event!r}, expected losses or scores", path=path, line=number)
        whole = position
    return header, records, whole


def finite_or_none(value: float) -> float | None:
    """The value as JSON can hold it."""
    return float(value) if math.isfinite(value) else None


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max  # NaN is not
    return finite and not isinstance(value, bool)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


# what a field must be, the same in words, and whether it must be there
_Rule = tuple[Callable[[Any], bool], str, bool]
_LOSS: _Rule = (lambda value: value is None or _is_number(value), "a number, or null where not finite", True)
_SECONDS: _Rule = (_is_number, "a number of seconds", False)
_TIMES = dict.fromkeys(("forward_s", "suggest_s", "hidden_s", "journal_s", "other_s", "seconds"), _SECONDS)
_ITERATION: dict[str, _Rule] = {"iteration": (_is_count, "a whole number", True), "loss": _LOSS, **_TIMES}
_HEADER: dict[str, _Rule] = {"versions": (_is_texts, "an object of names and versions", False)}
_EVENTS: dict[str, dict[str, _Rule]] = {
    "losses": {"of": (_is_pair, "two whole numbers", True), **_ITERATION},
    "scores": {
        "score": (_is_number, "a number", True),
        "calibration": (_is_numbers, "an object of names and numbers", False),
        **_ITERATION,
    },
}


def _check(line: dict[str, Any], rules: dict[str, _Rule], path: Path, number: int) -> None:
    """Raise ``FormatError`` for the first field that is not what a journal has there."""
    for name, (is_right, expected, needed) in rules.items():
        if name in line and not is_right(line[name]):
            raise FormatError(
                f"is {shown(line[name])}, expected {expected}", path=path, line=number, field=name
            )
        if needed and name not in line:
            raise FormatError(f"missing, expected {expected}", path=path, line=number, field=name)

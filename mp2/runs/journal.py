"""The journal: an append-only JSONL file that is a run's log and its checkpoint at once.

Line 1 is the header (what ran: config hash, weight hashes, versions). Then events in the order they
happened::

    {"event": "losses", "stage": 2, "layer": 3, "iteration": 141, "of": [140, 160], "candidate": "9f..",
    "loss": .7} {"event": "scores", "split": "dev", "at": "stage2", "iteration": 160, "score": 0.8, "loss":
    0.4}

A generation is one line a candidate, written with one ``write`` and made durable with one ``fsync``;
``of`` says which iterations belong together, so that a torn generation is recognised. Opening for resumption
drops a torn last line and a torn last generation: they were in flight. Losses are JSON numbers with all 17
digits, ``null`` where not finite. Each line has a checksum (:mod:`mp2.journal_lines`); those of before have
none and are read all the same.
"""

from __future__ import annotations

import math
import os
import shlex
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mp2.errors import FormatError, Mp2Error, shown
from mp2.files import open_own, open_to_append, write_all
from mp2.journal_lines import LineReader, journal_line
from mp2.json_files import Fields, JsonError, check, list_of, null_or, number, object_of, one_of, text, whole
from mp2.text_files import check_file

SCHEMA_VERSION = 1
_DAMAGED = "the journal was edited or damaged"


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
        self._file = open_to_append(path)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mp2-fsync")
        self._syncing: Future[None] | None = None

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Write the lines of one event.

        Raises:
            Mp2Error: the system refused (full disk, ...); what was journaled before is safe.
        """
        data = b"".join(map(journal_line, lines))
        try:
            self._settle()
            self._write(data)
            try:
                self._syncing = self._pool.submit(os.fsync, self._file.fileno())
            except RuntimeError:  # no more threads are given: then the run waits for the disk
                os.fsync(self._file.fileno())
        except OSError as error:
            raise Mp2Error(
                f"cannot write {self.path}: {error.strerror or error}. Only the generation in flight is "
                f"lost: make room, then go on with: mp2 bbt --resume {shlex.quote(str(self.path.parent))}"
            ) from error

    def _write(self, data: bytes) -> None:
        write_all(self._file, data)

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
    there = path.exists()
    recorded, records, n_bytes = read_journal(path) if there else (None, [], 0)
    if there:
        number = open_own(path, os.O_RDWR | os.O_APPEND)
        try:
            os.ftruncate(number, n_bytes)
            os.fsync(number)
        finally:
            os.close(number)
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
    check_file(path)
    data = path.read_bytes()
    header: dict[str, Any] | None = None
    records: list[Record] = []
    pending: list[dict[str, Any]] = []
    n_bytes = position = 0
    reader = LineReader()
    lines = data.split(b"\n")
    for at, raw in enumerate(lines[:-1], start=1):
        position += len(raw) + 1
        try:
            line = reader.read(raw)
        except JsonError as error:
            if at == len(lines) - 1:
                break  # torn by a power cut: a line end without its content
            raise FormatError(f"{error}; the journal was edited or damaged", path=path, line=at) from error
        if header is None:
            if line.get("event") != "header" or line.get("schema_version") != SCHEMA_VERSION:
                raise FormatError(
                    f"expected a journal header with schema_version {SCHEMA_VERSION}", path=path, line=at
                )
            found = check(line, _HEADER, path, line=at)
            if reader.fault is not None:
                if at == len(lines) - 1:
                    break  # torn, too
                raise FormatError(f"{reader.fault}; {_DAMAGED}", path=path, line=at)
            header = found
            n_bytes = position
            continue
        event = str(line.get("event"))
        if event not in _EVENTS:
            raise FormatError(
                f"is {shown(line.get('event'))}, expected losses or scores",
                path=path,
                line=at,
                field="event",
            )
        check(line, _EVENTS[event], path, line=at)
        if event == "losses":
            first, last = line["of"]
            if pending and line["of"] != pending[0]["of"]:
                raise FormatError(
                    f"is {line['of']}, expected {pending[0]['of']} as in its generation",
                    path=path,
                    line=at,
                    field="of",
                )
            if not first < last:
                raise FormatError(
                    f"is {line['of']}, expected two numbers that ascend", path=path, line=at, field="of"
                )
            if line["iteration"] != first + 1 + len(pending):
                raise FormatError(
                    f"iteration {line['iteration']}, expected {first + 1 + len(pending)}",
                    path=path,
                    line=at,
                )
        elif pending:
            raise FormatError("scores inside a generation", path=path, line=at)
        if reader.fault is not None:
            if at == len(lines) - 1:
                break  # torn, too
            raise FormatError(f"{reader.fault}; {_DAMAGED}", path=path, line=at)
        if event == "losses":
            pending.append(line)
            if line["iteration"] < last:
                continue
            records.append(Record(pending))
            pending = []
        else:
            records.append(Record([line]))
        n_bytes = position
    return header, records, n_bytes


def finite_or_none(value: float) -> float | None:
    """The value as JSON can hold it."""
    return float(value) if math.isfinite(value) else None


_SECONDS = number(0)
_TIMES = dict.fromkeys(("forward_s", "suggest_s", "hidden_s", "journal_s", "other_s", "seconds"), _SECONDS)
_LOSS = null_or(number())  # null where not finite
_HEADER = Fields({"event": one_of("header")}, {"versions": object_of(text)})
_EVENTS = {
    "losses": Fields(
        {"of": list_of(whole(), 2), "iteration": whole(1), "loss": _LOSS},
        {"stage": one_of(1, 2), "layer": whole(), "candidate": text, **_TIMES},
    ),
    "scores": Fields(
        {"score": number(0, 1), "iteration": whole(), "loss": _LOSS},
        {
            "split": one_of("dev", "test"),
            "at": text,
            "prompt": text,
            "exact_match": number(0, 1),
            "calibration": object_of(number()),
            **_TIMES,
        },
    ),
}

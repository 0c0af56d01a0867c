"""The lines that ``mp2 predict`` is given, in order: each an example, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mp2.errors import FormatError, UsageError
from mp2.tasks.columns import Columns
from mp2.tasks.problems import FirstProblem
from mp2.tasks.record import RecordParser
from mp2.tasks.record_files import Records, json_lines

if TYPE_CHECKING:
    from mp2.tasks import Example, TaskCard


@dataclass(frozen=True)
class InputLine:
    """One line: an example to label, or the ``reason`` why it gets no label; ``kept`` is copied beside it."""

    example: Example | None
    reason: str | None
    kept: dict[str, Any]


def text_records(card: TaskCard, lines: Iterable[bytes], name: str) -> Records:
    """Yield (line, object, or None for a blank line) of JSON lines, or of plain text for a task of one text.

    Raises:
        FormatError: a line that cannot be read; or no line with anything.
        UsageError: plain text for a task of several fields.
    """
    plain: bool | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            yield number, None
            continue
        if plain is None:
            plain = not line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{")
            if plain and (len(card.fields) != 1 or card.type == "multiple_choice"):
                raise UsageError(
                    f"plain text cannot be given to task '{card.task}', which has the fields "
                    f"{', '.join(card.fields)}: write each line as a JSON object with them"
                )
        if not plain:
            yield from json_lines([line], name, FirstProblem(), first=number)
            continue
        try:
            yield number, {card.fields[0]: line.decode("utf-8-sig").strip()}
        except UnicodeDecodeError:
            yield from json_lines([line], name, FirstProblem(), first=number)  # it says what is wrong
    if plain is None:
        raise FormatError("nothing to label; expected a text, or a JSON object, on each line", path=name)


def input_lines(
    card: TaskCard, records: Records, name: str, names: Mapping[str, str], keep: Sequence[str] | None
) -> Iterator[InputLine]:
    """Yield the lines of records; ``names`` are the data's for the card's keys, ``keep`` the columns to copy.

    ``keep`` None: all of them. Raises ``FormatError`` for a bad line.
    """
    columns = Columns(card, names)
    needed = (
        card.fields if card.type == "classification" else ("context",) if card.type == "extraction" else ()
    )
    for number, row in records:
        if row is None:
            yield InputLine(None, "empty line", {})
            continue
        kept: dict[str, Any] = {}
        if isinstance(row, dict):
            kept = dict(row) if keep is None else {column: row.get(column) for column in keep}
        record = columns(row)
        empty = [key for key in needed if isinstance(record, dict) and _is_blank(record.get(key))]
        if empty:
            yield InputLine(None, f"{', '.join(empty)} is empty", kept)
            continue
        example = RecordParser(card, name, number, FirstProblem(), False).example(record)
        yield InputLine(example, None, kept)


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()

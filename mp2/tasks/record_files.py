"""The records of a data file, whatever its format: JSON lines, a JSON array, CSV, TSV, parquet.

A record is an object with the file's own names; :mod:`mp2.tasks.record` maps these to the card's fields.
Text is UTF-8 with or without a byte order mark. CSV and TSV need a line of column names; TSV has no quotes.
The cells of a CSV file stand between commas, semicolons (as spreadsheets of many countries write them) or
tabs: whatever gives its first line the most columns, or what a line ``sep=;`` above it names.
"""

from __future__ import annotations

import codecs
import csv
import importlib
import io
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mp2.errors import MissingDependencyError, UsageError, shown
from mp2.json_files import JsonError, parse_json
from mp2.tasks.encodings import not_utf8
from mp2.tasks.faults import Faults
from mp2.text_files import check_file

TABLES = (".csv", ".tsv")
FORMATS = (".jsonl", ".json", *TABLES, ".parquet")
WORKBOOKS = (".xlsx", ".xls", ".xlsm", ".ods", ".et")
SEPARATORS = (",", ";", "\t")
_LONGEST_NAMES = 65536  # characters in which a table's line of names ends
Records = Iterator[tuple[int, Any]]
"""(line or row from 1, object)"""


def read_records(path: Path, faults: Faults, *, to_label: bool = False) -> Records:
    """Yield the records of a file by its suffix; lines that cannot be read go to ``faults``.

    With ``to_label`` tables keep their blank rows, and may have one column.
    """
    check_file(path)
    if ending(path) == ".parquet":
        return _parquet(path, faults)
    if ending(path) in TABLES:
        return _table(path, faults, to_label)
    if not is_lines(path):
        return _array(path, faults)
    check_ending(path)
    return _lines(path, faults)


def ending(path: Path) -> str:
    """Return how a file's name ends, in small letters: ``.csv`` of ``A.CSV``, too."""
    return path.suffix.lower()


def check_ending(path: Path, given: str = "") -> None:
    """Raise ``UsageError`` for a file of no format that is read; ``given`` names the option before it."""
    check_no_workbook(path, given)
    if ending(path) not in FORMATS:
        raise UsageError(f"{given} {path}: expected a file that ends in {', '.join(FORMATS)}".lstrip())


def check_no_workbook(path: Path, given: str = "") -> None:
    """Raise ``UsageError`` for a file of a spreadsheet program."""
    if ending(path) in WORKBOOKS:
        raise UsageError(
            f"{given} {path} is a workbook, which is not read: save its sheet as CSV UTF-8".lstrip()
        )


def class_names(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the names of the classes that columns of a parquet file have as numbers.

    The library ``datasets`` writes them into the file's schema; other files have none.
    """
    if ending(path) != ".parquet":
        return {}
    try:
        schema = importlib.import_module("pyarrow.parquet").read_schema(path)
        features = parse_json((schema.metadata or {})[b"huggingface"].decode())["info"]["features"]
        kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
        return {name: tuple(k["names"]) for name, k in kinds.items() if k.get("_type") == "ClassLabel"}
    except (ImportError, ValueError, OSError, LookupError, TypeError, AttributeError, JsonError):
        return {}  # what is wrong with the file itself is said where it is read


def json_lines(lines: Iterable[bytes | str], path: str, faults: Faults, first: int = 1) -> Records:
    """Yield the objects of JSON lines, skipping blank ones; ``first`` is the number of the first line."""
    for number, line in enumerate(lines, first):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8") if isinstance(line, bytes) else line
            if text.strip():
                yield number, parse_json(text)
        except UnicodeDecodeError as error:
            where = f" (byte {error.start})"
            faults.add(not_utf8(error.object, path, where), path, line=number)
        except JsonError as error:
            at = f" at column {error.column}; expected one object a line" if error.column else ""
            faults.add(f"{error}{at}", path, line=number)


def is_lines(path: Path) -> bool:
    """Tell whether a file is to be read line by line: no table, no JSON array."""
    array = ending(path) == ".json" and _first_sign(path) == b"["
    return not array and ending(path) not in (*TABLES, ".parquet")


def has_mark(path: Path) -> bool:
    """Tell whether a file begins with a byte order mark of UTF-8, as spreadsheets write it and expect it."""
    with path.open("rb") as file:
        return file.read(3) == codecs.BOM_UTF8


def csv_separator(path: Path) -> str:
    """Return what stands between the cells of a CSV file; a comma if nothing does."""
    with path.open("rb") as file:
        start = file.read(_LONGEST_NAMES).decode("utf-8-sig", errors="replace")
    return _separator(start)[0]


def _separator(text: str) -> tuple[str, int]:
    """Return what stands between the cells of a CSV text, and where its names begin (after ``sep=;``)."""
    if named := re.match(r"""\s*"?sep=(.)"?[;,\t]*\r?\n""", text, re.IGNORECASE):
        return named[1], named.end()
    names = text[:_LONGEST_NAMES].lstrip("\r\n")

    def n_columns(separator: str) -> int:
        try:
            return len(next(csv.reader(io.StringIO(names, newline=""), delimiter=separator), []))
        except csv.Error:
            return 0

    return max(SEPARATORS, key=n_columns), 0  # the first of those that are as good


def _first_sign(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _lines(path: Path, faults: Faults) -> Records:
    with path.open("rb") as file:
        yield from json_lines(file, str(path), faults)


def _text(path: Path, faults: Faults) -> str | None:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        faults.add(not_utf8(data, path), path, line=line)
        return None


def _array(path: Path, faults: Faults) -> Records:
    text = _text(path, faults)
    if text is None:
        return
    try:
        values = parse_json(text)
    except JsonError as error:
        faults.add(f"{error}; expected an array of objects", path, line=error.line)
        return
    yield from enumerate(values, 1)


def _table(path: Path, faults: Faults, to_label: bool) -> Records:
    """CSV as spreadsheets write it; TSV as it is published: tabs, no quotes, no line breaks in cells."""
    text = _text(path, faults)
    if text is None:
        return
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is shorter than an article
    tsv = ending(path) == ".tsv"
    separator, begin = ("\t", 0) if tsv else _separator(text)
    n_before = text.count("\n", 0, begin)
    cells = csv.reader(
        io.StringIO(text[begin:], newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_NONE if tsv else csv.QUOTE_MINIMAL,
        strict=True,
    )
    columns: list[str] | None = None
    try:
        for row in cells:
            if not any(cell.strip() for cell in row):
                if to_label and columns is not None:
                    yield n_before + cells.line_num, dict.fromkeys(columns, "")
                continue
            if columns is None:
                columns = [name.strip() for name in row]
                least = 1 if to_label else 2
                if len(columns) < least or len(set(columns)) < len(columns):
                    faults.add(
                        f"the first line is {shown(row)}, expected the names of {least} or more columns, "
                        f"each once, with {'tabs' if tsv else 'commas, semicolons or tabs'} between them",
                        path,
                        line=n_before + cells.line_num,
                    )
                    return
            elif len(row) != len(columns):
                faults.add(
                    f"has {len(row)} cells, expected {len(columns)}: {', '.join(columns)}",
                    path,
                    line=n_before + cells.line_num,
                )
            else:
                yield n_before + cells.line_num, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        faults.add(f"not {path.suffix[1:].upper()}: {error}", path, line=n_before + cells.line_num)


def _parquet(path: Path, faults: Faults) -> Records:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependencyError(f"{path}: parquet needs pyarrow; pip install 'mp2[hub]'") from error
    try:
        batches = parquet.ParquetFile(path).iter_batches()
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ValueError, OSError) as error:  # pyarrow's errors are children of these
        faults.add(f"not a parquet file: {str(error).splitlines()[0]}", path)

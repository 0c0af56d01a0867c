"""The formats that published data sets have beside tables and JSON lines, as records.

``format`` of a card's ``[source]``: ``""`` (by the file's suffix), ``lines`` (cells without names, see
``columns`` and ``separator``), ``squad`` (nested questions on paragraphs), ``c3`` (nested questions on
dialogues).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mp2.json_files import parse_json
from mp2.tasks.encodings import not_utf8
from mp2.tasks.faults import Faults
from mp2.tasks.record_files import Records, read_records
from mp2.text_files import check_file

SOURCE_FORMATS = ("", "lines", "squad", "c3")


def source_records(
    path: Path, form: str, columns: tuple[str, ...], separator: str, faults: Faults
) -> Records:
    """Yield the (line or number, object) pairs of a source file in its ``form``."""
    if form == "":
        yield from read_records(path, faults)
        return
    check_file(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        faults.add(not_utf8(error.object, path, f" ({error.reason})"), path)
        return
    if form == "lines":
        yield from _cells(text, path, columns, separator, faults)
        return
    try:
        nested = parse_json(text)
        yield from enumerate(_squad(nested) if form == "squad" else _c3(nested), 1)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        faults.add(f"not the format {form}: {type(error).__name__}: {error}", path)


def _cells(text: str, path: Path, columns: tuple[str, ...], separator: str, faults: Faults) -> Records:
    """Lines of cells; a line of another number of cells, which published files have, is left out."""
    n_left_out = 0
    for number, line in enumerate(text.split("\n"), 1):
        cells = line.rstrip("\r").split(separator)
        if len(cells) == len(columns):
            yield number, dict(zip(columns, cells, strict=True))
        elif line.strip():
            n_left_out += 1
    if n_left_out * 10 > text.count("\n") + 1:
        faults.add(f"{n_left_out} lines do not have the {len(columns)} cells {', '.join(columns)}", path)


def _squad(nested: Any) -> Iterator[dict[str, Any]]:
    """Questions on the paragraphs of articles, as SQuAD nests them.

    A question marked ``is_impossible`` has no answer.
    """
    for article in nested["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                given = [] if question.get("is_impossible") else question.get("answers", [])
                context = paragraph["context"]
                yield {
                    "context": context,
                    "question": question["question"],
                    "answers": [
                        _placed(context, a["text"], a.get("answer_start", -1)) for a in given if a["text"]
                    ],
                }


def _placed(context: str, text: str, start: int) -> dict[str, Any]:
    """An answer at its start, or at its first place in the context where the start is wrong."""
    return {
        "text": text,
        "start": start if context[start : start + len(text)] == text else context.find(text),
    }


def _c3(nested: Any) -> Iterator[dict[str, Any]]:
    """``[[sentences], [{"question", "choice", "answer"}], id]`` for each dialogue or passage."""
    for document, questions, _ in nested:
        for question in questions:
            yield {"context": " ".join(document), **question}

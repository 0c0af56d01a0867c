"""Examples of a task, from JSON lines or the Hugging Face hub.

``--data DIR`` (or MP2_DATA) reads ``DIR/<task>/{train,dev,test}.jsonl``, UTF-8, one object a line:

=================  ==========================================================================================
type               keys
=================  ==========================================================================================
classification     the template's fields (strings) and ``label``, one of the card's raw labels
extraction         the template's fields and ``answers``: a list of ``{"text": ..., "start": ...}`` with
                   ``context[start:start+len(text)] == text``; empty only where the card says ``unanswerable``
multiple_choice    the template's fields, ``options`` (2 or more strings) and ``label``, the right one's index
=================  ==========================================================================================

Other keys are ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mp2.errors import UnknownNameError, UsageError
from mp2.tasks.card import TaskCard
from mp2.tasks.card_rules import SPLITS
from mp2.tasks.example import Example
from mp2.tasks.problems import FirstProblem, Problems, shown
from mp2.tasks.record import RecordParser

DEMO_DIR = Path(__file__).parent / "demo"


def load_examples(
    card: TaskCard, split: str, data: str | Path | None = None, limit: int | None = None
) -> list[Example]:
    """Return the examples of a split, the first ``limit`` of them if given.

    The data comes from ``data`` or MP2_DATA, for the embedded demo tasks from the package, else from the hub.
    Raises ``FormatError`` (file, line, field, expected) at the first bad line.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    folder = data_folder(card, data)
    if folder is None:
        from mp2.tasks.hub import hub_records

        name, records = hub_records(card, split)
        found = parse_records(card, records, name, FirstProblem())
    else:
        path = folder / f"{split}.jsonl"
        if not path.is_file():
            if path.is_dir():
                raise UsageError(f"{path} is a folder, expected a file of JSON lines")
            have = ", ".join(sorted(p.name for p in folder.glob("*.jsonl"))) or "no .jsonl file"
            hint = "; without test examples tune with --no-test" if split == "test" else ""
            raise UsageError(f"task '{card.task}' has no {path}; the folder has {have}{hint}")
        found = read_examples(card, path, FirstProblem())
    examples = list(islice(found, limit))
    if not examples:
        raise UsageError(f"the {split} data of task '{card.task}' is empty")
    return examples


def data_folder(card: TaskCard, data: str | Path | None = None) -> Path | None:
    """Return the folder with a task's JSON lines, or None where only the hub is left to ask.

    Raises ``UsageError`` if a data folder was named but does not have the task.
    """
    root = data if data is not None else os.environ.get("MP2_DATA")
    demo = DEMO_DIR / card.task
    is_demo = card.task.startswith("demo_") and demo.is_dir()
    if not root:
        return demo if is_demo else None
    given = "--data" if data is not None else "MP2_DATA"
    if not Path(root).is_dir():
        raise UsageError(f"{given}: there is no folder {root}")
    folder = Path(root) / card.task
    if folder.is_dir():
        return folder
    if is_demo:
        return demo
    deeper = sorted(p.parent for p in Path(root).glob(f"*/{card.task}") if p.is_dir())
    if deeper:
        hint = "; did you mean " + " or ".join(f"--data {p}" for p in deeper[:3]) + "?"
    else:
        tasks = sorted(p.name for p in Path(root).iterdir() if p.is_dir())
        hint = (
            f"; it has {len(tasks)} tasks: " + shown(", ".join(tasks), 200)
            if tasks
            else "; it has no task folders"
        )
    raise UsageError(f"{given} {root} has no folder '{card.task}' (expected {folder}/train.jsonl){hint}")


def has_split(card: TaskCard, split: str, data: str | Path | None = None) -> bool:
    """Tell whether the task's data folder (``data``, MP2_DATA or the embedded demo's) holds a split."""
    folder = data_folder(card, data)
    return folder is not None and (folder / f"{split}.jsonl").is_file()


def read_examples(
    card: TaskCard, path: Path, problems: Problems, *, labelled: bool = True
) -> Iterator[Example]:
    """Yield the good examples of a JSON-lines file, skipping blank lines; bad ones go to ``problems``."""
    with path.open("rb") as file:
        yield from parse_lines(card, file, str(path), problems, labelled=labelled)


def parse_lines(
    card: TaskCard, lines: Iterable[bytes | str], path: str, problems: Problems, *, labelled: bool = True
) -> Iterator[Example]:
    """Yield the good examples of JSON lines; ``labelled=False``: label and answers may be missing."""

    def records() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(lines, 1):
            try:
                text = (
                    line.decode("utf-8-sig" if number == 1 else "utf-8") if isinstance(line, bytes) else line
                )
                if text.strip():
                    yield number, json.loads(text)
            except UnicodeDecodeError as error:
                problems.add(f"not UTF-8: {error.reason} at byte {error.start}", path, line=number)
            except json.JSONDecodeError as error:
                message = f"not JSON: {error.msg} at column {error.colno}; expected one object a line"
                problems.add(message, path, line=number)
            except ValueError:  # of Python itself: an integer too long to convert
                problems.add("not JSON that can be read: a number has too many digits", path, line=number)
            except RecursionError:
                problems.add("not JSON that can be read: nested too deep", path, line=number)

    yield from parse_records(card, records(), path, problems, labelled=labelled)


def parse_records(
    card: TaskCard,
    records: Iterable[tuple[int, Any]],
    path: str,
    problems: Problems,
    *,
    labelled: bool = True,
) -> Iterator[Example]:
    """Yield the good examples among (line, object) pairs; the bad ones go to ``problems``."""
    for line, record in records:
        example = RecordParser(card, path, line, problems, labelled).example(record)
        if example is not None:
            yield example

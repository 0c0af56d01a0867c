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
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mp2.errors import UnknownNameError, UsageError
from mp2.tasks.card import TaskCard
from mp2.tasks.card_rules import SPLITS
from mp2.tasks.problems import FirstProblem, Problems, shown

DEMO_DIR = Path(__file__).parent / "demo"


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
            have = ", ".join(sorted(p.name for p in folder.glob("*.jsonl"))) or "no .jsonl file"
            raise UsageError(f"task '{card.task}' has no {path}; the folder has {have}")
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
    folder = Path(root) / card.task
    if folder.is_dir():
        return folder
    if is_demo:
        return demo
    given = "--data" if data is not None else "MP2_DATA"
    if not Path(root).is_dir():
        raise UsageError(f"{given}: there is no folder {root}")
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
    """Tell whether the data folder (``data`` or MP2_DATA) holds a split of the task."""
    root = data if data is not None else os.environ.get("MP2_DATA")
    return bool(root) and (Path(str(root)) / card.task / f"{split}.jsonl").is_file()


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
        example = _Parser(card, path, line, problems, labelled).example(record)
        if example is not None:
            yield example


def _is_text(value: str) -> bool:
    """Tell whether a string is UTF-8: JSON can spell lone surrogates, tokenizers refuse them."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Parser:
    """Validates one object of one line."""

    def __init__(self, card: TaskCard, path: str, line: int, problems: Problems, labelled: bool) -> None:
        self.card, self.path, self.line, self.problems, self.labelled = card, path, line, problems, labelled
        self.good = True

    def report(self, message: str, field: str | None = None) -> None:
        self.good = False
        self.problems.add(message, self.path, line=self.line, field=field)

    def example(self, record: object) -> Example | None:
        if not isinstance(record, dict):
            self.report(f"got {shown(record)}, expected an object like {self.sample()}")
            return None
        fields = {name: self.text(record, name) for name in self.card.fields}
        label: str | int | None = None
        options: tuple[str, ...] = ()
        answers: tuple[Answer, ...] = ()
        if self.card.type == "classification":
            label = self.class_label(record)
        elif self.card.type == "multiple_choice":
            options = self.options(record)
            label = self.option_index(record, len(options))
        else:
            answers = self.answers(record, fields.get("context", ""))
        return Example(fields, label, options, answers, self.line) if self.good else None

    def sample(self) -> str:
        keys = [*self.card.fields]
        keys += {"classification": ["label"], "extraction": ["answers"]}.get(
            self.card.type, ["options", "label"]
        )
        return "{" + ", ".join(f'"{key}": ...' for key in keys) + "}"

    def text(self, record: dict[str, Any], name: str) -> str:
        if name not in record:
            keys = ", ".join(record) or "nothing"
            self.report(f"missing; the card's template shows {{{name}}}, the line has {keys}", name)
            return ""
        value = record[name]
        if not isinstance(value, str):
            self.report(f"got {shown(value)}, expected a string", name)
            return ""
        if not _is_text(value):
            self.report("has half of a surrogate pair, which is no character", name)
            return ""
        needed = self.card.type == "classification" or (self.card.type == "extraction" and name == "context")
        if needed and not value.strip():
            self.report("empty; expected some text", name)
        return value

    def class_label(self, record: dict[str, Any]) -> str | None:
        if "label" not in record:
            if self.labelled:
                self.report(f"missing; expected one of {self.known_labels()}", "label")
            return None
        label = record["label"]
        if not isinstance(label, str):
            quoted = f'; write it as "{label}"' if str(label) in self.card.labels else ""
            self.report(f"got {shown(label)}, expected a string{quoted}", "label")
            return None
        if label not in self.card.labels:
            self.report(f"unknown label '{label}'; the card knows {self.known_labels()}", "label")
            return None
        return label

    def known_labels(self) -> str:
        return ", ".join(self.card.labels)

    def options(self, record: dict[str, Any]) -> tuple[str, ...]:
        value = record.get("options")
        if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
            self.report(f"got {shown(value)}, expected a list of strings", "options")
            return ()
        if len(value) < 2:
            self.report(f"has {len(value)} options, expected at least 2", "options")
        for index, option in enumerate(value):
            if not option.strip() or not _is_text(option):
                self.report(f"option {index} is empty or no text", "options")
            elif option in value[:index]:
                self.report(f"option {index} repeats {shown(option)}", "options")
        return tuple(value)

    def option_index(self, record: dict[str, Any], n_options: int) -> int | None:
        if "label" not in record and not self.labelled:
            return None
        label = record.get("label")
        if not isinstance(label, int) or isinstance(label, bool):
            self.report(f"got {shown(label)}, expected the index of the right option, from 0", "label")
            return None
        if n_options and not 0 <= label < n_options:
            self.report(f"got {label}, expected 0 to {n_options - 1}: there are {n_options} options", "label")
        return label

    def answers(self, record: dict[str, Any], context: str) -> tuple[Answer, ...]:
        if "answers" not in record and not self.labelled:
            return ()
        value = record.get("answers")
        if not isinstance(value, list):
            self.report(f"got {shown(value)}, expected a list of {{text, start}}", "answers")
            return ()
        if not value and self.labelled and not self.card.unanswerable:
            self.report("no answer; if that is meant, the card needs 'unanswerable = true'", "answers")
        return tuple(
            answer for index, item in enumerate(value) if (answer := self.answer(index, item, context))
        )

    def answer(self, index: int, item: object, context: str) -> Answer | None:
        text = item.get("text") if isinstance(item, dict) else None
        start = item.get("start") if isinstance(item, dict) else None
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
            self.report(
                f"answer {index}: got {shown(item)}, expected {{text, start}}: a string and a number",
                "answers",
            )
            return None
        if not text.strip():
            self.report(f"answer {index} is empty", "answers")
            return None
        if start < 0 or context[start : start + len(text)] != text:
            there = f"'{context[start : start + len(text)]}'" if 0 <= start < len(context) else "nothing"
            found = context.find(text)
            hint = f"; it first stands at {found}" if found >= 0 else "; it does not occur in the context"
            self.report(f"answer {index}: context has {there} at {start}, expected '{text}'{hint}", "answers")
            return None
        return Answer(text, start)

"""From a record's own names and spellings to the card's: columns, labels, options, answers.

A key of the card is looked for, in this order: under the name given with ``--field KEY=NAME``, under its own
name, under the name in the card's ``[source.fields]``. A name may reach into a nested value (``a.b``);
several with commas are put together: the options of a multiple-choice task in columns A, B, C, D.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mp2.errors import UsageError
from mp2.tasks.card import TaskCard


@dataclass(frozen=True)
class Columns:
    """Maps records of files, or with ``hub`` those of the card's own source, to what the validator expects.

    ``given`` are the user's names; ``class_names`` those of a hub column of class indices.
    """

    card: TaskCard
    given: Mapping[str, str] = field(default_factory=dict)
    hub: bool = False
    class_names: Sequence[str] | None = None

    def __call__(self, row: Any) -> Any:
        """Return the record of a row, its other names beside; what is no object stays as it is."""
        if not isinstance(row, dict):
            return row
        keys = (*self.card.fields, *self.card.gold_keys)
        record = {str(name): value for name, value in row.items() if name not in keys}
        for key in keys:
            try:
                record[key] = self._value(row, key)
            except KeyError:
                continue  # reported as missing by the validator
        for key in self.card.fields:
            if isinstance(record.get(key), list | tuple):
                record[key] = self._join.join(map(str, record[key]))
        if self.card.type == "classification" and "label" in record:
            record["label"] = self._label(record["label"])
        if self.card.type == "multiple_choice" and "options" in record:
            record["options"] = _listed(record["options"])
            if self._mapped(row, "label"):
                record["label"] = option_index(record.get("label"), record["options"])
        if self.card.type == "extraction" and "answers" in record:
            record["answers"] = _answers(_listed(record["answers"]), record.get("context"))
        return record

    def _mapped(self, row: Mapping[str, Any], key: str) -> bool:
        """Tell whether a key is read by the source's name for it."""
        source = self.card.source
        return bool(
            source and key in source.fields and key not in self.given and (self.hub or key not in row)
        )

    def _value(self, row: Mapping[str, Any], key: str) -> Any:
        name = self.given.get(key, key)
        if self._mapped(row, key):
            assert self.card.source is not None
            name = self.card.source.fields[key]
        if "," in name:
            return [_reach(row, part.strip()) for part in name.split(",")]
        return _reach(row, name)

    @property
    def _join(self) -> str:
        return self.card.source.join if self.card.source else " "

    def _label(self, label: Any) -> Any:
        """Return a raw label of the card; what is none is left for the validator to name.

        Files may have the card's labels or the source's; the hub has the source's.
        """
        if self.class_names is not None and isinstance(label, int) and 0 <= label < len(self.class_names):
            label = self.class_names[label]
        label = written(label)
        mapped = self.card.source.labels if self.card.source else {}
        if isinstance(label, str) and label in mapped and (self.hub or label not in self.card.labels):
            return mapped[label]
        if isinstance(label, str) and label not in self.card.labels and label.lower() in self.card.labels:
            return label.lower()  # True and true
        return label


def written(label: Any) -> Any:
    """Return a label as the card writes it: whole numbers and truth values as text, others as they are."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return str(int(label))
    return label.strip() if isinstance(label, str) else label


def option_index(label: Any, options: Any) -> Any:
    """Return the index that a source's label means: an index, an option's text, a letter (A is the first)."""
    if isinstance(label, str) and isinstance(options, list):
        if label in options:
            return options.index(label)
        if label.isascii() and label.isdigit():
            return int(label)
        if len(label) == 1 and "A" <= label <= "Z":
            return ord(label) - ord("A")
    return label


def parse_fields(given: Sequence[str], card: TaskCard) -> dict[str, str]:
    """Return the names of ``--field KEY=NAME``; raises ``UsageError`` for a key that the card lacks."""
    keys = (*card.fields, *card.gold_keys)
    names = {}
    for text in given:
        key, equals, name = text.partition("=")
        if not equals or not name.strip() or key.strip() not in keys:
            raise UsageError(
                f"--field {text}: expected KEY=NAME, the name in the data of one of {', '.join(keys)}"
            )
        names[key.strip()] = name.strip()
    return names


def mapped(columns: Columns, records: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Return the (line, record) pairs with their records mapped."""
    return ((line, columns(record)) for line, record in records)


def _reach(row: Any, path: str) -> Any:
    if isinstance(row, dict) and path in row:
        return row[path]
    for step in path.split("."):
        if not isinstance(row, dict):
            raise KeyError(step)
        row = row[step]
    return row


def _listed(value: Any) -> Any:
    """Return a list that a cell of CSV holds as JSON."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return list(value) if isinstance(value, tuple) else value


def _answers(answers: Any, context: Any) -> Any:
    """Return answers as a list of ``{text, start}``, each once.

    SQuAD's ``{text: [...], answer_start: [...]}`` is taken apart; an answer that is a text, or has none or a
    wrong start, starts where the context has it first.
    """
    if isinstance(answers, dict) and "text" in answers:
        starts: list[int] = answers.get("answer_start") or answers.get("start") or []
        pairs = dict.fromkeys(zip(answers["text"], starts, strict=False))
        return [{"text": text, "start": start} for text, start in pairs]
    if isinstance(answers, str):
        answers = [answers] if answers.strip() else []
    if not isinstance(answers, list) or not isinstance(context, str):
        return answers
    return [
        {"text": a, "start": context.find(a)} if isinstance(a, str) and a in context else a for a in answers
    ]

"""One record of task data: from the names and spellings of a file or the hub to an example, all checked.

`Columns` maps a record to the card's keys, `RecordParser` checks it and makes the example. A key of the card
is looked for, in this order: under the name given with ``--field KEY=NAME``, under its own name, under the
name in the card's ``[source.fields]``. A name may reach into a nested value (``a.b``); several with commas
are put together: the options of a multiple-choice task in columns A, B, C, D.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mp2.errors import UsageError, shown
from mp2.json_files import JsonError, parse_json
from mp2.tasks.card import TaskCard
from mp2.tasks.example import Answer, Example
from mp2.tasks.faults import Faults

MANY_LABELS = 20  # a message lists as many


@dataclass(frozen=True)
class Columns:
    """Maps records of files, or with ``hub`` those of the card's own source, to what the validator expects.

    ``given`` are the user's names; ``classes`` the names of the classes of columns that have their numbers.
    """

    card: TaskCard
    given: Mapping[str, str] = field(default_factory=dict)
    hub: bool = False
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

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
            parts = record.get(key)
            if isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts):
                record[key] = self._join.join(parts)
        if self.card.type == "classification" and "label" in record:
            record["label"] = self._label(record["label"], self.classes.get(self._name(row, "label"), ()))
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

    def _name(self, row: Mapping[str, Any], key: str) -> str:
        """Return what a key is called in a row."""
        if self._mapped(row, key):
            assert self.card.source is not None
            return self.card.source.fields[key]
        return self.given.get(key, key)

    def _value(self, row: Mapping[str, Any], key: str) -> Any:
        name = self._name(row, key)
        if "," in name:
            return [_reach(row, part.strip()) for part in name.split(",")]
        return _reach(row, name)

    @property
    def _join(self) -> str:
        return self.card.source.join if self.card.source else " "

    def _label(self, label: Any, names: Sequence[str]) -> Any:
        """Return a raw label of the card; what is none is left for the validator to name.

        Files may have the card's labels or the source's; the hub has the source's. Of a class, ``names`` has
        its name: the card may know it by its number, too.
        """
        mapped = self.card.source.labels if self.card.source else {}
        if isinstance(label, int) and 0 <= label < len(names):
            by_number = not self.hub and names[label] not in (*self.card.labels, *mapped)
            if not by_number or written(label) not in (*self.card.labels, *mapped):
                label = names[label]
        label = written(label)
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


class RecordParser:
    """Makes an example of one JSON object, or reports everything that is wrong with it to ``faults``.

    With ``labelled`` false, label and answers may be missing.
    """

    def __init__(self, card: TaskCard, path: str, line: int, faults: Faults, labelled: bool) -> None:
        self._card, self._path, self._line = card, path, line
        self._faults, self._labelled = faults, labelled
        self._good = True

    def _report(self, message: str, field: str | None = None) -> None:
        self._good = False
        self._faults.add(message, self._path, line=self._line, field=field)

    def example(self, record: object) -> Example | None:
        """Return the example; None if the object is not a good one."""
        if not isinstance(record, dict):
            self._report(f"got {shown(record)}, expected an object like {self._sample()}")
            return None
        fields = {name: self._text(record, name) for name in self._card.fields}
        label: str | int | None = None
        options: tuple[str, ...] = ()
        answers: tuple[Answer, ...] = ()
        if self._card.type == "classification":
            label = self._class_label(record)
        elif self._card.type == "multiple_choice":
            options = self._options(record)
            label = self._option_index(record, len(options))
        else:
            answers = self._answers(record, fields.get("context", ""))
        return Example(fields, label, options, answers, self._line) if self._good else None

    def _sample(self) -> str:
        keys = [*self._card.fields]
        keys += {"classification": ["label"], "extraction": ["answers"]}.get(
            self._card.type, ["options", "label"]
        )
        return "{" + ", ".join(f'"{key}": ...' for key in keys) + "}"

    def _text(self, record: dict[str, Any], name: str) -> str:
        if name not in record:
            hint = f"; --field {name}=NAME gives its name there" if record else ""
            self._report(
                f"missing; the card's template shows {{{name}}}, the line has "
                f"{shown(list(record), 200)}{hint}",
                name,
            )
            return ""
        value = record[name]
        if not isinstance(value, str):
            self._report(f"got {shown(value)}, expected a string", name)
            return ""
        if not _is_text(value):
            self._report("has half of a surrogate pair, which is no character", name)
            return ""
        needed = self._card.type == "classification" or (
            self._card.type == "extraction" and name == "context"
        )
        if needed and is_blank(value):
            self._report("empty; expected some text", name)
        return value

    def _class_label(self, record: dict[str, Any]) -> str | None:
        if "label" not in record:
            if self._labelled:
                self._report(f"missing; expected one of {self._known_labels()}", "label")
            return None
        label = record["label"]
        if not isinstance(label, str):
            self._report(f"got {shown(label)}, expected one of {self._known_labels()}", "label")
            return None
        if not label:
            self._report(f"empty; expected one of {self._known_labels()}", "label")
            return None
        if label not in self._card.labels:
            self._report(f"unknown label {shown(label)}; the card knows {self._known_labels()}", "label")
            return None
        return label

    def _known_labels(self) -> str:
        """Return the labels, the first of them where there are many."""
        labels = list(self._card.labels)
        more = f", ... ({len(labels)} in all)" if len(labels) > MANY_LABELS else ""
        return ", ".join(labels[:MANY_LABELS]) + more

    def _options(self, record: dict[str, Any]) -> tuple[str, ...]:
        value = record.get("options")
        if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
            self._report(f"got {shown(value)}, expected a list of strings", "options")
            return ()
        if len(value) < 2:
            self._report(f"has {len(value)} options, expected at least 2", "options")
        for index, option in enumerate(value):
            if is_blank(option) or not _is_text(option):
                self._report(f"option {index} is empty or no text", "options")
            elif option in value[:index]:
                self._report(f"option {index} repeats {shown(option)}", "options")
        return tuple(value)

    def _option_index(self, record: dict[str, Any], n_options: int) -> int | None:
        if "label" not in record and not self._labelled:
            return None
        label = record.get("label")
        if isinstance(label, str):
            label = self._meant(label.strip(), record.get("options"))
        if not isinstance(label, int) or isinstance(label, bool):
            self._report(
                f"got {shown(label)}, expected the right option: its index from 0, its letter or its text",
                "label",
            )
            return None
        if n_options and not 0 <= label < n_options:
            self._report(
                f"got {label}, expected 0 to {n_options - 1}: there are {n_options} options", "label"
            )
        return label

    def _meant(self, label: str, options: object) -> Any:
        """Return the index that a text means; a number that is also an option's text is reported."""
        found = option_index(label, options)
        if isinstance(options, list) and label in options and label.isdigit() and int(label) != found:
            self._report(
                f"{shown(label)} is both an index and the text of option {found}; write its letter", "label"
            )
        return found

    def _answers(self, record: dict[str, Any], context: str) -> tuple[Answer, ...]:
        if "answers" not in record and not self._labelled:
            return ()
        value = record.get("answers")
        if not isinstance(value, list):
            self._report(f"got {shown(value)}, expected a list of {{text, start}}", "answers")
            return ()
        if not value and self._labelled and not self._card.unanswerable:
            self._report("no answer; if that is meant, the card needs 'unanswerable = true'", "answers")
        return tuple(
            answer for index, item in enumerate(value) if (answer := self._answer(index, item, context))
        )

    def _answer(self, index: int, item: object, context: str) -> Answer | None:
        if isinstance(item, str):  # one that the context has, has been given its start already
            self._report(f"answer {index}: {shown(item)} does not occur in the context", "answers")
            return None
        text = item.get("text") if isinstance(item, dict) else None
        start = item.get("start") if isinstance(item, dict) else None
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
            self._report(
                f"answer {index}: got {shown(item)}, expected {{text, start}}: a string and a number",
                "answers",
            )
            return None
        if is_blank(text):
            self._report(f"answer {index} is empty", "answers")
            return None
        if start < 0 or context[start : start + len(text)] != text:
            there = shown(context[start : start + len(text)]) if 0 <= start < len(context) else "nothing"
            found = context.find(text)
            hint = f"; it first stands at {found}" if found >= 0 else "; it does not occur in the context"
            self._report(
                f"answer {index}: context has {there} at {start}, expected {shown(text)}{hint}", "answers"
            )
            return None
        return Answer(text, start)


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
            return parse_json(value)
        except JsonError:
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


def is_blank(text: str) -> bool:
    """Tell whether a text has no character that a reader sees, nor a tokenizer of the BERT family keeps.

    White space, control characters (NUL) and characters without width (U+200B, a byte order mark) are none.
    """
    return all(sign in _UNSEEN or unicodedata.category(sign) in _UNSEEN_KINDS for sign in text)


_UNSEEN = "\ufffd" + "".join(map(chr, range(0xFE00, 0xFE10)))  # a decoder's mark; variation selectors
_UNSEEN_KINDS = ("Cc", "Cf", "Zs", "Zl", "Zp")


def _is_text(value: str) -> bool:
    """Tell whether a string is UTF-8: JSON can spell lone surrogates, tokenizers refuse them."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True

"""One line of task data: from a JSON object to an example, every value checked."""

from __future__ import annotations

from typing import Any

from mp2.tasks.card import TaskCard
from mp2.tasks.columns import option_index
from mp2.tasks.example import Answer, Example
from mp2.tasks.problems import Problems, shown

MANY_LABELS = 20  # a message lists as many


class RecordParser:
    """Makes an example of one JSON object, or reports everything that is wrong with it to ``problems``.

    With ``labelled`` false, label and answers may be missing.
    """

    def __init__(self, card: TaskCard, path: str, line: int, problems: Problems, labelled: bool) -> None:
        self._card, self._path, self._line = card, path, line
        self._problems, self._labelled = problems, labelled
        self._good = True

    def _report(self, message: str, field: str | None = None) -> None:
        self._good = False
        self._problems.add(message, self._path, line=self._line, field=field)

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
            keys = ", ".join(map(str, record)) or "nothing"
            hint = f"; --field {name}=NAME gives its name there" if record else ""
            self._report(
                f"missing; the card's template shows {{{name}}}, the line has {keys[:200]}{hint}", name
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
        if needed and not value.strip():
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
            if not option.strip() or not _is_text(option):
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
        if not text.strip():
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


def _is_text(value: str) -> bool:
    """Tell whether a string is UTF-8: JSON can spell lone surrogates, tokenizers refuse them."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True

"""What a task card must be: the rules that :func:`mp2.tasks.card.read_card` checks, with line numbers."""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from mp2.errors import shown
from mp2.tasks.faults import Faults
from mp2.tasks.source_formats import SOURCE_FORMATS

TYPES = ("classification", "extraction", "multiple_choice")
TRACKS = ("upstream", "unseen_data", "unseen_task", "extra")
METRIC_OF_TYPE = {"classification": "accuracy", "extraction": "f1", "multiple_choice": "accuracy"}
SPLITS = ("train", "dev", "test")
DEFAULT_MAX_ANSWER_TOKENS = 64
TASK_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")  # it is part of a folder's name, with method, seed and time
TASK_NAME_RULE = "a name like 'my_task': small letters, digits and _, a letter first, at most 64"
DEFAULT_HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}

_QUOTES = "\"'"
_REQUIRED = {
    "task": str,
    "family": str,
    "type": str,
    "template": str,
    "metric": str,
    "track": str,
    "version": int,
}
_OPTIONAL: dict[str, type] = {
    "shots_per_label": int,
    "unanswerable": bool,
    "max_answer_tokens": int,
    "labels": dict,
    "source": dict,
    "cloze": str,
}
_SOURCE: dict[str, type] = {
    **dict.fromkeys(("hub", "config", "join", "format", "columns", "separator"), str),
    **dict.fromkeys(("fields", "splits", "labels", "files", "digests", "counts"), dict),
    **dict.fromkeys(("page", "licence", "note"), str),
    "held_out": float,
    "confirmed": bool,
}
_KIND: dict[type, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a table",
}


@cache
def template_parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """Return a template as (text, name of the field after it or None); ``ValueError`` if malformed."""
    parts = []
    for literal, name, spec, conversion in string.Formatter().parse(template):
        if name is not None and (spec or conversion or not name.isidentifier()):
            raise ValueError(f"'{{{name}}}' is not a plain field name")
        parts.append((literal, name))
    return tuple(parts)


class CardRules:
    """Validates the raw table of one card, with line numbers."""

    def __init__(self, path: Path, text: str, faults: Faults) -> None:
        self.path, self.faults, self.n_faults = path, faults, 0
        self.lines = text.split("\n")

    def report(self, message: str, *keys: str) -> None:
        """Report a fault of the key at the path ``keys``."""
        self.n_faults += 1
        self.faults.add(message, self.path, line=self.line(*keys), field=".".join(keys) or None)

    def line(self, *keys: str) -> int | None:
        """Return the line (from 1) where a key, or else the innermost table around it, is written."""
        for depth in range(len(keys), 0, -1):
            name = ".".join(keys[:depth])
            table = ""
            for number, line in enumerate(self.lines, 1):
                if header := re.match(r"\s*\[\s*([^\]]+?)\s*\]", line):
                    table = header[1]
                    if table == name:
                        return number
                elif assigned := re.match(r"""\s*("(?:[^"\\]|\\.)*"|'[^']*'|[\w-]+)\s*=""", line):
                    key = f"{table}.{assigned[1].strip(_QUOTES)}".lstrip(".")
                    if key == name:
                        return number
        return None

    def check(self, raw: dict[str, Any]) -> None:
        """Report everything that is wrong with the card's table."""
        known: dict[str, type] = {**_REQUIRED, **_OPTIONAL}
        for key in raw:
            if key not in known:
                self.report(f"no such key; expected one of {', '.join(known)}", key)
        for key in _REQUIRED:
            if key not in raw:
                self.report(f"missing; expected {_KIND[_REQUIRED[key]]}", key)
        good = {key for key in raw if key in known and self._typed(raw[key], known[key], key)}
        if "task" in good and not TASK_NAME.fullmatch(raw["task"]):
            self.report(f"got {shown(raw['task'])}, expected {TASK_NAME_RULE}", "task")
        if "family" in good and not raw["family"].strip():
            self.report("empty; expected what kind of task this is, as in 'topic classification'", "family")
        for key, choices in (("type", TYPES), ("track", TRACKS)):
            if key in good and raw[key] not in choices:
                self.report(f"got {shown(raw[key])}, expected one of {', '.join(choices)}", key)
                good.discard(key)
        for key in ("version", "shots_per_label", "max_answer_tokens"):
            if key in good and raw[key] < 1:
                self.report(f"got {raw[key]}, expected 1 or more", key)
        kind = raw["type"] if "type" in good else None
        if kind is not None:
            self._by_type(raw, good, kind)
        if "labels" in good:
            self._labels(raw["labels"])
        if "source" in good:
            self._source(raw["source"], raw.get("labels") if "labels" in good else None)

    def _typed(self, value: object, kind: type, *keys: str) -> bool:
        ok = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        if not ok:
            self.report(f"got {shown(value)}, expected {_KIND[kind]}", *keys)
        return ok

    def _by_type(self, raw: dict[str, Any], good: set[str], kind: str) -> None:
        if "metric" in good and raw["metric"] != METRIC_OF_TYPE[kind]:
            self.report(
                f"got {shown(raw['metric'])}, expected '{METRIC_OF_TYPE[kind]}', the metric of {kind} tasks",
                "metric",
            )
        if kind == "classification":
            if "labels" not in raw:
                self.report("missing; expected a table of raw label = shown word", "labels")
        else:
            for key in ("labels", "shots_per_label"):
                if key in raw:
                    self.report(f"a {kind} task has no {key}; remove it", key)
        if kind != "extraction":
            for key in ("unanswerable", "max_answer_tokens"):
                if key in raw:
                    self.report("only an extraction task has this; remove it", key)
        if "template" in good:
            self._template(raw["template"], kind)
        if "cloze" in good:
            self._cloze(raw["cloze"], kind)

    def _cloze(self, cloze: str, kind: str) -> None:
        if kind == "extraction":
            self.report(f"an {kind} task has no cloze; remove it", "cloze")
            return
        try:
            names = [name for _, name in template_parts(cloze) if name is not None]
        except ValueError as error:
            self.report(f"{error}; fields are written {{name}}, a literal brace {{{{ or }}}}", "cloze")
            return
        if names.count("label") != 1:
            self.report(f"shows {{label}} {names.count('label')} times, expected once", "cloze")
        for name, times in Counter(names).items():
            if name != "label" and times > 1:
                self.report(f"shows {{{name}}} {times} times, expected once", "cloze")
        if kind == "classification" and "options" in names:
            self.report("shows {options}, which only the template has", "cloze")
        if kind == "multiple_choice" and "options" not in names:
            self.report("shows no {options}; a multiple_choice task brings them with each example", "cloze")

    def _template(self, template: str, kind: str) -> None:
        try:
            names = [name for _, name in template_parts(template) if name is not None]
        except ValueError as error:
            self.report(f"{error}; fields are written {{name}}, a literal brace {{{{ or }}}}", "template")
            return
        for name, times in Counter(names).items():
            if times > 1:
                self.report(f"shows {{{name}}} {times} times, expected once", "template")
            if name in ("label", "answers"):
                self.report(f"shows {{{name}}}, which would give the answer away", "template")
        fields = {name for name in names if name != "options"}
        if kind == "extraction":
            if "options" in names:
                self.report("shows {options}, which an extraction task does not have", "template")
            if "context" not in fields:
                self.report("does not show {context}, the text that holds the answer", "template")
            return
        if "options" not in names:
            self.report("does not show {options}", "template")
        if not fields:
            example = "{text}" if kind == "classification" else "{question}"
            self.report(f"shows no text field, expected at least one, as in {example}", "template")

    def _labels(self, labels: dict[str, Any]) -> None:
        if len(labels) < 2:
            self.report(f"has {len(labels)} labels, expected at least 2", "labels")
        words: dict[str, str] = {}
        for raw_label, word in labels.items():
            if not self._typed(word, str, "labels", raw_label):
                continue
            if not word.strip():
                self.report("empty word", "labels", raw_label)
            elif word in words:
                self.report(
                    f"the word '{word}' is already that of '{words[word]}'; words must differ",
                    "labels",
                    raw_label,
                )
            words.setdefault(word, raw_label)

    def _source(self, source: dict[str, Any], labels: dict[str, Any] | None) -> None:
        for key, value in source.items():
            if key not in _SOURCE:
                self.report(f"no such key; expected one of {', '.join(_SOURCE)}", "source", key)
            elif self._typed(value, _SOURCE[key], "source", key) and isinstance(value, dict):
                for inner, text in value.items():
                    self._typed(text, int if key == "counts" else str, "source", key, inner)
        if "hub" not in source:
            for key in ("config", "splits"):
                if key in source:
                    self.report(
                        "is of a hub data set, and none is named; add hub, as in 'clue/clue'", "source", key
                    )
        for key in ("splits", "files", "counts"):
            for split in source[key] if isinstance(source.get(key), dict) else ():
                if split not in SPLITS:
                    self.report(f"no such split; expected one of {', '.join(SPLITS)}", "source", key, split)
        if "hub" in source and "files" in source:
            self.report("beside hub; a source has one or the other", "source", "files")
        if isinstance(form := source.get("format"), str) and form not in SOURCE_FORMATS:
            self.report(
                f"got {shown(form)}, expected one of {', '.join(map(repr, SOURCE_FORMATS))}",
                "source",
                "format",
            )
        if isinstance(share := source.get("held_out"), float) and not 0 <= share < 1:
            self.report(f"got {share}, expected a share from 0 to below 1", "source", "held_out")
        if labels and isinstance(mapped := source.get("labels"), dict):
            for hub_label, raw_label in mapped.items():
                if isinstance(raw_label, str) and raw_label not in labels:
                    known = ", ".join(labels)
                    self.report(
                        f"maps to unknown label '{raw_label}'; known: {known}", "source", "labels", hub_label
                    )

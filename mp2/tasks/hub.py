"""Task data from the Hugging Face hub, through the optional library ``datasets`` (extra ``mp2[hub]``).

The hub's rows are turned into the objects of :mod:`mp2.tasks.data` and validated like lines of a file.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from mp2.errors import MissingDependencyError, UsageError
from mp2.tasks.card import TaskCard


def hub_records(card: TaskCard, split: str) -> tuple[str, Iterator[tuple[int, dict[str, Any]]]]:
    """Return a name for messages and the (row from 1, object) pairs of a split.

    Raises ``UsageError`` that names both ways to get data if the card has no source, the library is missing
    or the hub cannot be reached.
    """
    local = f"give a folder with --data DIR (or MP2_DATA) that has {card.task}/{split}.jsonl"
    if card.source is None:
        raise UsageError(
            f"no data for task '{card.task}': its card names no hub data set; {local}. "
            "'mp2 tasks show' shows the fields"
        )
    source = card.source
    where = source.hub + (f" ({source.config})" if source.config else "")
    if split not in source.splits:
        have = ", ".join(source.splits)
        raise UsageError(f"{where} has no {split} data for task '{card.task}', only {have}; {local}")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingDependencyError(
            f"no data for task '{card.task}'. Two ways: {local}; or pip install 'mp2[hub]' and be online to "
            f"download {where}"
        ) from error
    try:
        rows = datasets.load_dataset(source.hub, source.config, split=source.splits[split])
    except Exception as error:  # the library's and its HTTP client's errors have no common base
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"no data for task '{card.task}'. Two ways: {local}; or be online to download {where}, "
            f"which failed ({reason})"
        ) from error
    return f"{where} {source.splits[split]}", _objects(card, rows)


def _objects(card: TaskCard, rows: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    assert card.source is not None
    source = card.source
    keys = [*card.fields, *card.gold_keys]
    column = {key: source.fields.get(key, key) for key in keys}
    names = _class_names(rows, column["label"]) if card.type == "classification" else None
    for number, row in enumerate(rows, 1):
        record: dict[str, Any] = {}
        for key in keys:
            try:
                record[key] = _reach(row, column[key])
            except KeyError:
                continue  # reported as missing by the validator
        for key in card.fields:
            if isinstance(record.get(key), list | tuple):
                record[key] = source.join.join(map(str, record[key]))
        if card.type == "classification" and "label" in record:
            label = str(_name_of(record["label"], names))
            record["label"] = source.labels.get(label, label)
        elif card.type == "multiple_choice":
            record["options"] = list(record.get("options", ()))
            record["label"] = _option_index(record.get("label"), record["options"])
        elif card.type == "extraction":
            record["answers"] = _squad_answers(record.get("answers"))
        yield number, record


def _reach(row: Any, path: str) -> Any:
    for step in path.split("."):
        if not isinstance(row, dict):
            raise KeyError(step)
        row = row[step]
    return row


def _class_names(rows: Any, column: str) -> list[str] | None:
    features = getattr(rows, "features", None) or {}
    names = getattr(features.get(column), "names", None)
    return list(names) if names is not None else None


def _name_of(label: Any, names: list[str] | None) -> Any:
    """Return the name of a class index; -1 (unlabelled) and labels without names stay as they are."""
    if names is not None and isinstance(label, int) and 0 <= label < len(names):
        return names[label]
    return label


def _option_index(label: Any, options: list[str]) -> Any:
    """Return the index that a label means: an index, the text of an option, or a letter (A is the first)."""
    if isinstance(label, str):
        if label in options:
            return options.index(label)
        if len(label) == 1 and "A" <= label <= "Z":
            return ord(label) - ord("A")
    return label


def _squad_answers(answers: Any) -> Any:
    """Return SQuAD's ``{text: [...], answer_start: [...]}`` as a list of ``{text, start}``, each once."""
    if not isinstance(answers, dict) or "text" not in answers:
        return answers
    starts: list[int] = answers.get("answer_start") or answers.get("start") or []
    pairs = dict.fromkeys(zip(answers["text"], starts, strict=False))
    return [{"text": text, "start": start} for text, start in pairs]

"""Task data through the library ``datasets`` (extra ``mp2[hub]``): the card's source, or a named set.

Rows are mapped as those of files are (:mod:`mp2.tasks.record`) and validated like them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from mp2.errors import MissingDependencyError, UsageError
from mp2.tasks.card import TaskCard
from mp2.tasks.place import DataSet
from mp2.tasks.record import Columns, mapped

Records = Iterator[tuple[int, Any]]
_SPLITS = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}


def hub_records(card: TaskCard, split: str) -> tuple[str, Records]:
    """Return a name for messages and the (row from 1, object) pairs of a split.

    Raises ``UsageError`` that names both ways to get data if the card has no source, the library is missing
    or the hub cannot be reached.
    """
    local = f"give a folder with --data DIR (or MP2_DATA) that has {card.task}/{split}.jsonl"
    if card.source is None or card.source.hub is None:
        raise UsageError(
            f"no data for task '{card.task}': its card names no hub data set; {local}; "
            f"'mp2 tasks fetch {card.task} --to DIR' loads it or says what to do"
        )
    source = card.source
    hub = card.source.hub
    where = hub + (f" ({source.config})" if source.config else "")
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
        rows = datasets.load_dataset(hub, source.config, split=source.splits[split])
    except Exception as error:  # the library's and its HTTP client's errors have no common base
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"no data for task '{card.task}'. Two ways: {local}; or be online to download {where}, "
            f"which failed ({reason})"
        ) from error
    return f"{where} {source.splits[split]}", _mapped(card, rows, {}, hub=True)


def set_records(card: TaskCard, place: DataSet, split: str, fields: Mapping[str, str]) -> tuple[str, Records]:
    """Return the same for a split of a set that was named; ``fields`` are its names for the card's keys."""
    name = set_splits(card, place).get(split)
    where = place.name + (f" ({place.config})" if place.config else "")
    if name is None:
        have = ", ".join(_load(place)) or "none"
        raise UsageError(f"{where} has no {split} split for task '{card.task}'; its splits: {have}")
    own = card.source is not None and card.source.hub == place.name
    return f"{where} {name}", _mapped(card, _load(place)[name], fields, hub=own)


def set_splits(card: TaskCard, place: DataSet) -> dict[str, str]:
    """Return which of the set's splits are our train, dev and test."""
    have = _load(place)
    if card.source is not None and card.source.hub == place.name:
        return {ours: theirs for ours, theirs in card.source.splits.items() if theirs in have}
    return {
        ours: name for ours, names in _SPLITS.items() if (name := next((n for n in names if n in have), None))
    }


def training_rows(place: DataSet) -> tuple[list[dict[str, Any]], dict[str, tuple[str, ...]]]:
    """Return the rows of a set's training split, and the names of classes that columns have as numbers."""
    splits = _load(place)
    if "train" not in splits:
        raise UsageError(f"{place.name} has no train split; its splits: {', '.join(splits) or 'none'}")
    return [dict(row) for row in splits["train"]], _classes(splits["train"])


@cache
def _load(place: DataSet) -> dict[str, Any]:
    """Return the set's splits by name."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingDependencyError(f"{place.name}: needs datasets; pip install 'mp2[hub]'") from error
    try:
        if place.saved:
            found = datasets.load_from_disk(place.name)
        else:
            found = datasets.load_dataset(place.name, place.config)
    except Exception as error:  # the library's and its HTTP client's errors have no common base
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"{place.name} could not be loaded by datasets ({reason})") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _mapped(card: TaskCard, rows: Any, fields: Mapping[str, str], *, hub: bool) -> Records:
    columns = Columns(card, fields, hub, _classes(rows))
    return mapped(columns, iter(enumerate(rows, 1)))


def _classes(rows: Any) -> dict[str, tuple[str, ...]]:
    """Return the names of the classes of columns that have their numbers."""
    features = getattr(rows, "features", None) or {}
    found = {name: getattr(kind, "names", None) for name, kind in features.items()}
    return {name: tuple(names) for name, names in found.items() if names}

"""Examples of a task, from files or from the Hugging Face hub.

Where they lie is in :mod:`mp2.tasks.place`, the formats of files in :mod:`mp2.tasks.record_files`. A record
has

=================  ==========================================================================================
type               keys
=================  ==========================================================================================
classification     the template's fields (strings) and ``label``, one of the card's raw labels
extraction         the template's fields and ``answers``: a list of ``{"text": ..., "start": ...}`` with
                   ``context[start:start+len(text)] == text``; empty only where the card says ``unanswerable``
multiple_choice    the template's fields, ``options`` (2 or more strings) and ``label``, the right one's index
=================  ==========================================================================================

under these names or others (:mod:`mp2.tasks.record`). Other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mp2.errors import UnknownNameError, UsageError
from mp2.tasks.card import TaskCard
from mp2.tasks.card_rules import SPLITS
from mp2.tasks.example import Example
from mp2.tasks.faults import Faults, FirstFault
from mp2.tasks.place import Files, find_place
from mp2.tasks.record import Columns, RecordParser, mapped
from mp2.tasks.record_files import FORMATS, class_names, read_records


def load_examples(
    card: TaskCard,
    split: str,
    data: str | Path | None = None,
    limit: int | None = None,
    fields: Mapping[str, str] | None = None,
) -> list[Example]:
    """Return the examples of a split, the first ``limit`` of them if given.

    The data comes from ``data`` or MP2_DATA, for the embedded demo tasks from the package, else from the hub.
    ``fields`` are the names of the card's keys in the data. Raises ``FormatError`` (file, line, field,
    expected) at the first bad line.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    place = find_place(card, data)
    if isinstance(place, Files):
        found = read_examples(card, split_file(card, place, split), FirstFault(), fields=fields)
    else:
        from mp2.tasks.hub import hub_records, set_records

        name, records = (
            hub_records(card, split) if place is None else set_records(card, place, split, fields or {})
        )
        found = parse_records(card, records, name, FirstFault())
    examples = list(islice(found, limit))
    if not examples:
        raise UsageError(f"the {split} data of task '{card.task}' is empty")
    return examples


def split_file(card: TaskCard, place: Files, split: str) -> Path:
    """Return the file of a split; raises ``UsageError`` that says what is there instead."""
    path = place.by_split.get(split)
    if path is None:
        hint = "; without test examples tune with --no-test" if split == "test" else ""
        if place.named == place.by_split.get("train"):
            name, ending = place.named.name, place.named.suffix
            way = (
                f"there is no {name.replace('train', split)} beside {place.named}"
                if "train" in place.named.stem
                else f"{place.named} is read alone; call it train{ending} and put {split}{ending} beside it"
            )
            raise UsageError(f"task '{card.task}' has no {split} examples: {way}{hint}")
        have = ", ".join(sorted(p.name for p in place.by_split.values())) or "no data file"
        expected = f"{split}.jsonl (or {', '.join(FORMATS[1:])})"
        raise UsageError(f"task '{card.task}' has no {expected}; {place.named} has {have}{hint}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected a file of data")
    return path


def has_split(card: TaskCard, split: str, data: str | Path | None = None) -> bool:
    """Tell whether there is data of a split without asking the hub for the card's source."""
    place = find_place(card, data)
    if isinstance(place, Files):
        return place.by_split.get(split) is not None
    if place is None:
        return False
    from mp2.tasks.hub import set_splits

    return split in set_splits(card, place)


def read_examples(
    card: TaskCard,
    path: Path,
    faults: Faults,
    *,
    fields: Mapping[str, str] | None = None,
) -> Iterator[Example]:
    """Yield the good examples of a file, skipping blank lines; bad ones go to ``faults``."""
    records = mapped(Columns(card, fields or {}, classes=class_names(path)), read_records(path, faults))
    yield from parse_records(card, records, str(path), faults)


def parse_records(
    card: TaskCard,
    records: Iterable[tuple[int, Any]],
    path: str,
    faults: Faults,
) -> Iterator[Example]:
    """Yield the good examples among (line, object) pairs; the bad ones go to ``faults``."""
    for line, record in records:
        example = RecordParser(card, path, line, faults, True).example(record)
        if example is not None:
            yield example

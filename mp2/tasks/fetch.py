"""Loads the public data of tasks: what ``mp2 tasks fetch`` does.

A card's ``[source]`` names a hub data set or files with their addresses; they are converted to
``DIR/<task>/*.jsonl``, which ``--data DIR`` reads. ``DIR/<task>/source.json`` says where they came from and
comes last: a task that has it for the same source is not fetched again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mp2.errors import Mp2Error, UsageError
from mp2.files import write_json, write_text
from mp2.json_files import Fields, check, list_of, object_of, read_object, text, whole
from mp2.tasks.card import Source, TaskCard, list_cards, load_card
from mp2.tasks.download import download, member
from mp2.tasks.example import Example
from mp2.tasks.faults import AllFaults
from mp2.tasks.record import Columns, RecordParser, mapped
from mp2.tasks.source_formats import source_records

DOWNLOADS = ".downloads"
RECORD = "source.json"
_RECORD = Fields({"key": text, "examples": object_of(whole()), "remarks": list_of(text)})
MAX_BAD_SHARE = 0.05  # published files have some bad lines; more means that the source has changed


@dataclass(frozen=True)
class Fetched:
    """What came of one task: examples by split, remarks; ``new`` is false where it was there already."""

    task: str
    n_examples: dict[str, int]
    remarks: tuple[str, ...]
    new: bool = True

    def __str__(self) -> str:
        counts = ", ".join(f"{n:,} {split}" for split, n in self.n_examples.items())
        lines = [f"{self.task}: {counts}" + ("" if self.new else " (there already)")]
        return "\n".join([*lines, *(f"  note: {remark}" for remark in self.remarks)])


def fetch_all(names: Sequence[str], to: Path, say: Callable[[str], None]) -> tuple[list[Fetched], list[str]]:
    """Load several tasks, ``all`` for every card of the package; returns what came and what did not.

    ``say`` hears of each task before it is loaded, and why one failed. Raises the error where only one was
    asked for.
    """
    cards = list_cards() if list(names) == ["all"] else [load_card(name) for name in names]
    cards = [card for card in cards if not card.task.startswith("demo_")]
    fetched, failed = [], []
    for card in cards:
        say(f"fetching {card.task}")
        try:
            fetched.append(fetch_task(card, to))
        except Mp2Error as error:
            if len(cards) == 1:
                raise
            failed.append(card.task)
            say(str(error))
    return fetched, failed


def fetch_task(card: TaskCard, to: Path) -> Fetched:
    """Load a task's public data to ``to/<task>``; what is there from the same source stays.

    Raises:
        UsageError: the card names no source that a program can load; the message says what to do.
        Mp2Error: the source cannot be reached.
        FormatError: a checksum differs, or what came is not what the card says.
    """
    source = card.source
    if source is None or not (source.hub or source.files):
        raise UsageError(by_hand(card, to))
    folder = to / card.task
    done = folder / RECORD
    key = hashlib.sha256(json.dumps([asdict(source), card.labels], sort_keys=True).encode()).hexdigest()
    if done.is_file():
        known = check(read_object(done), _RECORD, done)
        if known["key"] == key:
            return Fetched(card.task, known["examples"], tuple(known["remarks"]), new=False)
    elif any(folder.glob("*.jsonl")):
        raise UsageError(f"{folder} has data that was not fetched; give another --to, or move it away")
    splits: dict[str, list[Example]] = {}
    remarks: list[str] = []
    for split in source.splits if source.hub else source.files:
        splits[split] = _examples(card, source, split, to, remarks)
    if source.held_out and "test" not in splits:
        splits = _hold_out(splits, source.held_out)
        remarks.append(
            f"the source has no labelled test set: {100 * source.held_out:.0f} % of train became it"
        )
    remarks += _differences(card, source, splits)
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in splits.items():
        text = "".join(json.dumps(_line(card, e), ensure_ascii=False) + "\n" for e in examples)
        write_text(folder / f"{split}.jsonl", text)
    counts = {split: len(examples) for split, examples in splits.items()}
    record = {"key": key, "source": asdict(source), "examples": counts, "remarks": remarks}
    write_json(done, record)
    return Fetched(card.task, counts, tuple(remarks))


def by_hand(card: TaskCard, to: Path) -> str:
    """Return what to do for a task whose source no program can load."""
    source = card.source
    say = f"task '{card.task}' has no public source that can be loaded"
    if source is not None and source.page:
        say += f"; see {source.page}"
    if source is not None and source.note:
        say += f" ({source.note})"
    return f"{say}; put your copy in {to / card.task} as train.jsonl, train.csv or train.tsv"


def _examples(card: TaskCard, source: Source, split: str, to: Path, remarks: list[str]) -> list[Example]:
    """Return the good examples of a split, each text once."""
    faults = AllFaults()
    if source.hub:
        from mp2.tasks.hub import hub_records

        name, records = hub_records(card, split)
    else:
        name, records = source.files[split], _file_records(card, source, split, to, faults)
    found: dict[Any, Example] = {}
    n_all = 0
    for line, record in records:
        n_all += 1
        example = RecordParser(card, name, line, faults, True).example(record)
        if example is not None:
            found.setdefault((*example.fields.items(), example.options), example)
    n_bad = len({fault.line for fault in faults.found})
    if not found or n_bad > MAX_BAD_SHARE * n_all:
        first = faults.found[0] if faults.found else f"{name}: no examples"
        raise UsageError(
            f"{n_bad} of {n_all} {split} examples are not what the card says; the first: {first}"
        )
    if n_bad:
        remarks.append(f"{n_bad} of {n_all} {split} examples were left out; the first: {faults.found[0]}")
    return list(found.values())


def _file_records(
    card: TaskCard, source: Source, split: str, to: Path, faults: AllFaults
) -> Iterator[tuple[int, Any]]:
    """Yield the records of a split's files."""
    columns = Columns(card, hub=True)
    names = tuple(part.strip() for part in source.columns.split(",")) if source.columns else ()
    for address in source.files[split].split():
        url, _, inside = address.partition("#")
        path = download(url, to / DOWNLOADS, source.digests.get(split) or source.digests.get("all"))
        if inside:
            path = member(path, inside, to / DOWNLOADS)
        yield from mapped(columns, source_records(path, source.format, names, source.separator, faults))


def _hold_out(splits: dict[str, list[Example]], share: float) -> dict[str, list[Example]]:
    """Give a share of train to test, by a hash of the text: the same ones whatever the order."""

    def is_test(example: Example) -> bool:
        text = json.dumps([*example.fields.values(), *example.options], ensure_ascii=False)
        return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < share * 2**32

    train = splits["train"]
    return {
        **splits,
        "train": [example for example in train if not is_test(example)],
        "test": [example for example in train if is_test(example)],
    }


def _differences(card: TaskCard, source: Source, splits: dict[str, list[Example]]) -> list[str]:
    """Say where counts or labels are not those that the card expects."""
    remarks = []
    for split, expected in source.counts.items():
        found = len(splits.get(split, ()))
        if abs(found - expected) > MAX_BAD_SHARE * expected:
            remarks.append(f"{split} has {found:,} examples, expected about {expected:,}")
    if card.type == "classification":
        seen = Counter(str(example.label) for example in splits["train"])
        if missing := [label for label in card.labels if not seen[label]]:
            remarks.append(f"train has no example of {', '.join(missing[:5])}")
    return remarks


def _line(card: TaskCard, example: Example) -> dict[str, Any]:
    """Return an example as a line of data."""
    line: dict[str, Any] = dict(example.fields)
    if card.type == "extraction":
        line["answers"] = [asdict(answer) for answer in example.answers]
        return line
    if card.type == "multiple_choice":
        line["options"] = list(example.options)
    return {**line, "label": example.label}

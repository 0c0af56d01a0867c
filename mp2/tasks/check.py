"""Checks a card and its data and reports everything that is wrong: what ``mp2 tasks check`` runs.

Faults are what ``mp2 bbt`` would refuse, found by the same code; remarks are what it would cut, drop or
say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mp2.errors import UsageError
from mp2.tasks.card import TaskCard, find_card, read_card
from mp2.tasks.data import parse_records, read_examples, split_file
from mp2.tasks.example import Example
from mp2.tasks.faults import AllFaults, Fault, grouped
from mp2.tasks.fewshot import few_shot_split, n_also_in
from mp2.tasks.lengths import lengths, none_fits
from mp2.tasks.place import DataSet, Files, find_place
from mp2.tasks.record import MANY_LABELS, parse_fields

if TYPE_CHECKING:
    from mp2.backbone.tokenizer import Tokenizer


class Reading(Protocol):
    """What writes examples as token sequences for one backbone and one kind of head."""

    tokenizer: Tokenizer
    max_tokens: int


@dataclass(frozen=True)
class Readings:
    """How a run reads examples: ``by_head`` has the one head that it takes, or those it chooses from.

    ``fits`` tells whether a run can write an example at all; ``remarks`` say which head is out, and why.
    """

    by_head: Mapping[str, Reading]
    fits: Callable[[Example], bool]
    remarks: tuple[str, ...] = ()

    @property
    def max_tokens(self) -> int:
        """The longest sequence."""
        return next(iter(self.by_head.values())).max_tokens


@dataclass(frozen=True)
class CheckReport:
    """What was found: ``faults`` (empty: all is well), counts a split and a label, and remarks."""

    card: TaskCard | None
    faults: tuple[Fault, ...]
    n_examples: dict[str, int]
    n_by_label: dict[str, dict[str, int]]
    remarks: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {
            "task": self.card.task if self.card else None,
            "ok": self.ok,
            "faults": [
                {"path": p.path, "line": p.line, "field": p.field, "message": p.message} for p in self.faults
            ],
            "examples": self.n_examples,
            "labels": self.n_by_label,
            "remarks": list(self.remarks),
        }

    def __str__(self) -> str:
        lines = kinds = grouped(self.faults)
        n, n_kinds = len(self.faults), len(kinds)
        if self.card is not None:
            counts = ", ".join(f"{n} {split}" for split, n in self.n_examples.items())
            lines.append(f"{self.card.task}: {self.card.type}" + (f", {counts}" if counts else ""))
        for split, labels in self.n_by_label.items():
            lines.append(f"  {split}: {_counts(labels)}")
        lines += [f"  note: {remark}" for remark in self.remarks]
        of_kinds = f" of {n_kinds} kind{'s' if n_kinds > 1 else ''}" if n_kinds < n else ""
        lines.append(f"{n} fault{'s' if n > 1 else ''}{of_kinds}" if n else "no faults")
        return "\n".join(lines)


def _counts(labels: Mapping[str, int]) -> str:
    """Return the examples of each label; of many labels the rarest."""
    short = {label: label if len(label) <= 40 else f"{label[:39]}…" for label in labels}
    if len(labels) <= MANY_LABELS:
        return ", ".join(f"{short[label]} {n}" for label, n in labels.items())
    rare = sorted(labels, key=lambda label: labels[label])[:5]
    fewest = ", ".join(f"{short[label]} {labels[label]}" for label in rare)
    return f"{len(labels)} labels of {min(labels.values())} to {max(labels.values())}; fewest: {fewest}"


def check_task(
    name_or_path: str,
    data: str | Path | None = None,
    *,
    readings: Callable[[TaskCard], Readings] | None = None,
    shots: int | None = None,
    dev: bool = True,
    test: bool = True,
    fields: Sequence[str] = (),
) -> CheckReport:
    """Validate a card and, if there is data, every line of it.

    ``readings`` makes what writes examples for a backbone and its heads: with it label words, options and
    lengths are checked as well. ``dev`` and ``test`` say whether such examples are asked for. ``fields`` are
    ``KEY=NAME`` as of ``--field``. Raises only where nothing can be checked (no such card or data folder).
    """
    path = find_card(name_or_path)
    faults = AllFaults()
    card = read_card(path, faults)
    if card is None:
        return CheckReport(None, tuple(faults.found), {}, {}, ("the data is checked once the card is right",))
    names = parse_fields(fields, card)
    remarks: list[str] = []
    place = find_place(card, data)
    splits: dict[str, list[Example]] = {}
    if place is None:
        remarks.append("no data was checked; --data DIR (or MP2_DATA) names it")
    else:
        asked = ["train", *["dev"] * dev, *["test"] * test]
        splits = _read_splits(card, place, faults, names, asked)
    made = None
    if readings is not None:
        try:
            made = readings(card)
            remarks += made.remarks
        except UsageError as error:
            faults.add(str(error), path)
    if not faults.found and "train" in splits:
        remarks += _as_tuning_does(card, splits, made, shots, dev, faults)
    n_by_label: dict[str, dict[str, int]] = {}
    if card.type == "classification":
        for split, examples in splits.items():
            counts = Counter(str(example.label) for example in examples)
            n_by_label[split] = {label: counts[label] for label in card.labels}
    return CheckReport(
        card,
        tuple(faults.found),
        {split: len(examples) for split, examples in splits.items()},
        n_by_label,
        tuple(remarks),
    )


def _read_splits(
    card: TaskCard, place: Files | DataSet, faults: AllFaults, names: Mapping[str, str], asked: Sequence[str]
) -> dict[str, list[Example]]:
    splits = {}
    if isinstance(place, DataSet):
        from mp2.tasks.hub import set_records, set_splits

        for split in [split for split in set_splits(card, place) if split in asked]:
            name, records = set_records(card, place, split, names)
            splits[split] = list(parse_records(card, records, name, faults))
        for split in asked:
            if split not in splits and split != "dev":
                try:
                    set_records(card, place, split, names)
                except UsageError as error:
                    faults.add(str(error), place.name)
        return splits
    for split in asked:
        path = place.by_split.get(split)
        if path is None:
            if split != "dev":  # which is optional: it is drawn from train
                try:
                    split_file(card, place, split)
                except UsageError as error:
                    faults.add(str(error), place.named)
        elif path.is_dir():
            faults.add("is a folder, expected a file of data", path)
        else:
            before = len(faults.found)
            splits[split] = list(read_examples(card, path, faults, fields=names))
            if not splits[split] and len(faults.found) == before:
                faults.add("no examples; expected one a line", path)
    return splits


def _as_tuning_does(
    card: TaskCard,
    splits: dict[str, list[Example]],
    readings: Readings | None,
    shots: int | None,
    dev: bool,
    faults: AllFaults,
) -> list[str]:
    """Draw the few-shot split as ``mp2 bbt`` does; what it refuses is a fault, what it says a remark."""
    remarks = []
    fitting = splits
    if readings is not None:
        fitting = {split: [e for e in examples if readings.fits(e)] for split, examples in splits.items()}
        for split, examples in splits.items():
            if n := len(examples) - len(fitting[split]):
                then = "are left out" if split != "test" else "count as wrong"
                remarks.append(
                    f"{n} of {len(examples)} {split} examples do not fit {readings.max_tokens} tokens: "
                    f"their options leave no room for the text; they {then}"
                )
        remarks += _cuts(card, fitting, readings)
        if "test" in splits and not fitting["test"]:
            faults.add(none_fits(card, readings.max_tokens), card.path)
    try:
        own_dev = fitting.get("dev", ()) if dev else ()
        drawn = few_shot_split(card, fitting["train"], 8, shots, dev_examples=own_dev, select=dev)
        remarks += drawn.remarks
    except UsageError as error:
        faults.add(str(error), card.path)
    for name in ("dev", "test"):
        if n := n_also_in(splits["train"], splits.get(name, ())):
            remarks.append(f"{n} of the {name} examples are also in train")
    return remarks


def _cuts(card: TaskCard, splits: Mapping[str, Sequence[Example]], readings: Readings) -> list[str]:
    """Say what each head cuts of each split; of several heads only where any of them cuts something."""
    lines = {
        (split, head): measured.line(f"{split} texts")
        for split, examples in splits.items()
        for head, one in readings.by_head.items()
        if (measured := lengths(card, one.tokenizer, one.max_tokens, examples, type(one))) is not None
    }
    if len(readings.by_head) == 1:
        return [line for line in lines.values() if line]
    cut = [split for split in splits if any(lines.get((split, head)) for head in readings.by_head)]
    if not cut:
        return []
    said = [
        "which head reads the texts is known when the run starts: the better one on the training examples; "
        "what each of them would cut (--head NAME takes one):"
    ]
    for head in readings.by_head:
        said += [f"head {head}: {lines[split, head] or f'no {split} text is cut'}" for split in cut]
    return said

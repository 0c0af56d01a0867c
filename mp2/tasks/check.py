"""Checks a card and its data and reports everything that is wrong: what ``mp2 tasks check`` runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mp2.errors import UsageError
from mp2.tasks.card import TaskCard, find_card, read_card
from mp2.tasks.data import data_folder, read_examples
from mp2.tasks.example import Example
from mp2.tasks.fewshot import few_shot_split
from mp2.tasks.problems import AllProblems, Problem


@dataclass(frozen=True)
class CheckReport:
    """What was found: ``problems`` (empty: all is well), counts a split and a label, and remarks."""

    card: TaskCard | None
    problems: tuple[Problem, ...]
    n_examples: dict[str, int]
    n_by_label: dict[str, dict[str, int]]
    remarks: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {
            "task": self.card.task if self.card else None,
            "ok": self.ok,
            "problems": [
                {"path": p.path, "line": p.line, "field": p.field, "message": p.message}
                for p in self.problems
            ],
            "examples": self.n_examples,
            "labels": self.n_by_label,
            "remarks": list(self.remarks),
        }

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems]
        if self.card is not None:
            counts = ", ".join(f"{n} {split}" for split, n in self.n_examples.items())
            lines.append(f"{self.card.task}: {self.card.type}" + (f", {counts}" if counts else ""))
        for split, labels in self.n_by_label.items():
            lines.append(f"  {split}: " + ", ".join(f"{label} {n}" for label, n in labels.items()))
        lines += [f"  note: {remark}" for remark in self.remarks]
        n = len(self.problems)
        lines.append("no problems" if not n else f"{n} problem{'s' if n > 1 else ''}")
        return "\n".join(lines)


def check_task(name_or_path: str, data: str | Path | None = None) -> CheckReport:
    """Validate a card and, if there is local data, every line of it.

    Raises only where nothing can be checked (no such card or data folder).
    """
    path = find_card(name_or_path)
    problems = AllProblems()
    card = read_card(path, problems)
    if card is None:
        return CheckReport(
            None, tuple(problems.found), {}, {}, ("the data is checked once the card is right",)
        )
    remarks: list[str] = []
    folder = data_folder(card, data)
    splits: dict[str, list[Example]] = {}
    if folder is None:
        remarks.append("no data was checked; --data DIR (or MP2_DATA) names it")
    else:
        splits = _read_splits(card, folder, problems)
        if "test" not in splits:
            remarks.append(f"no {folder / 'test.jsonl'}; tune with --no-test, or put labelled examples there")
    if not problems.found and "train" in splits:
        remarks += _remarks(card, splits)
    n_by_label: dict[str, dict[str, int]] = {}
    if card.type == "classification":
        for split, examples in splits.items():
            counts = Counter(str(example.label) for example in examples)
            n_by_label[split] = {label: counts[label] for label in card.labels}
    return CheckReport(
        card,
        tuple(problems.found),
        {split: len(examples) for split, examples in splits.items()},
        n_by_label,
        tuple(remarks),
    )


def _read_splits(card: TaskCard, folder: Path, problems: AllProblems) -> dict[str, list[Example]]:
    splits = {}
    for split in ("train", "dev", "test"):
        path = folder / f"{split}.jsonl"
        if path.is_file():
            before = len(problems.found)
            splits[split] = list(read_examples(card, path, problems))
            if not splits[split] and len(problems.found) == before:
                problems.add("no examples; expected one JSON object a line", path)
        elif path.is_dir():
            problems.add("is a folder, expected a file of JSON lines", path)
        elif split == "train":  # dev is optional, it is drawn from train; so is test, with --no-test
            problems.add("missing; expected JSON lines", path)
    return splits


def _remarks(card: TaskCard, splits: dict[str, list[Example]]) -> list[str]:
    """Return what is legal but worth knowing: too few examples for few shots, test texts in train."""
    remarks = []
    try:
        few_shot_split(card, splits["train"], seed=0)
    except UsageError as error:
        remarks.append(str(error))
    seen = {_texts(example) for example in splits["train"]}
    for split in ("dev", "test"):
        n = sum(_texts(example) in seen for example in splits.get(split, ()))
        if n:
            remarks.append(f"{n} of the {split} examples are also in train")
    return remarks


def _texts(example: Example) -> tuple[str, ...]:
    return (*example.fields.values(), *example.options)

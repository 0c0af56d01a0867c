"""What ``mp2 tasks``, its ``show`` and ``sources`` show: tasks, one with an example, where data come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mp2.errors import UsageError
from mp2.tasks.card import Source, TaskCard, list_cards, load_card
from mp2.tasks.data import load_examples
from mp2.tasks.example import Example
from mp2.tasks.lengths import UNCUT
from mp2.tasks.mrc import MrcFormatter, filled_template
from mp2.tasks.place import find_place

if TYPE_CHECKING:
    from mp2.backbone.tokenizer import Tokenizer

PERCENTILES = (50, 90, 99, 100)
N_MEASURED = 1000  # examples of the training data whose lengths are measured
SOURCE_HEAD = ("task", "track", "source", "format", "licence", "confirmed", "tested with", "note")


def task_rows() -> list[dict[str, Any]]:
    """Return one record a card: task, type, family, number of labels, track."""
    return [
        {
            "task": c.task,
            "type": c.type,
            "family": c.family,
            "labels": len(c.labels) or None,
            "track": c.track,
        }
        for c in list_cards()
    ]


@dataclass(frozen=True)
class TaskView:
    """A card with one example written out and, where there is data, token lengths."""

    card: TaskCard
    example: str
    gold: str | None
    n_template_tokens: int | None  # None: a label word cannot be spelled
    token_percentiles: dict[str, int]
    n_measured: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the view as JSON-able values."""
        card = self.card
        return {
            "task": card.task,
            "family": card.family,
            "type": card.type,
            "template": card.template,
            "metric": card.metric,
            "track": card.track,
            "version": card.version,
            "shots_per_label": card.shots_per_label,
            "fields": list(card.fields),
            "labels": card.labels,
            "hub": card.source.hub if card.source else None,
            "path": str(card.path),
            "example": self.example,
            "gold": self.gold,
            "template_tokens": self.n_template_tokens,
            "token_percentiles": self.token_percentiles,
            "n_measured": self.n_measured,
            "notes": list(self.notes),
        }

    def rows(self) -> list[tuple[str, str]]:
        """The view for people: names and words."""
        card, version = self.card, f"version {self.card.version}"
        rows = [
            ("task", f"{card.task}: {card.family}, {card.type}, {card.track}, {card.metric}, {version}"),
            ("card", str(card.path)),
            ("template", card.template),
            ("fields", ", ".join(card.fields)),
        ]
        if card.labels:
            labels = ", ".join(f"{k} = {v}" for k, v in card.labels.items())
            rows.append(("labels", f"{len(card.labels)}: {labels}"))
        if card.source and card.source.hub:
            config = f" ({card.source.config})" if card.source.config else ""
            rows.append(("hub", f"{card.source.hub}{config}"))
        rows.append(("example", self.example))
        if self.gold is not None:
            rows.append(("answer", self.gold))
        if self.n_template_tokens is not None:
            rows.append(("tokens", f"{self.n_template_tokens} for template and options"))
        if self.token_percentiles:
            shown = ", ".join(f"{n} at {p}" for p, n in self.token_percentiles.items())
            rows.append(("", f"{shown} of {self.n_measured} training examples, uncut"))
        return [*rows, *(("note", note) for note in self.notes)]


def view_task(
    name_or_path: str,
    data: str | Path | None = None,
    backbone: str | None = None,
    revision: str | None = None,
) -> TaskView:
    """Return a task's view; without local data the example has placeholders (the hub is not asked).

    Tokens are counted with the tokenizer of ``backbone`` (with ``revision``), or of the embedded one where
    none is given.
    """
    tokenizer = backbone_tokenizer(backbone, revision)
    card = load_card(name_or_path)
    notes: list[str] = []
    examples: list[Example] = []
    try:
        if find_place(card, data) is not None:
            examples = load_examples(card, "train", data, limit=N_MEASURED)
        else:
            notes.append("no local data; --data DIR (or MP2_DATA) shows a real example and the lengths")
    except UsageError as error:
        if data is not None:
            raise
        notes.append(str(error))
    n_fixed, lengths = None, []
    try:
        formatter = MrcFormatter(card, tokenizer, UNCUT)
        n_fixed = formatter.n_fixed_tokens
        lengths = [formatter.training_input(e, 0).n_tokens for e in examples]
    except UsageError as error:  # ridge needs no label words
        notes.append(f"the span head cannot read it: {error}")
    return TaskView(
        card=card,
        example=filled_template(card, examples[0] if examples else _placeholder(card)),
        gold=_gold(card, examples[0]) if examples else None,
        n_template_tokens=n_fixed,
        token_percentiles=token_percentiles(lengths),
        n_measured=len(lengths),
        notes=tuple(notes),
    )


def backbone_tokenizer(backbone: str | None, revision: str | None = None) -> Tokenizer:
    """Return the tokenizer of a backbone (None: the embedded one), of a local one without its weights."""
    from mp2.backbone import load_backbone
    from mp2.backbone.load import EMBEDDED
    from mp2.backbone.tokenizer import Tokenizer

    name = backbone or "mini"
    folder = EMBEDDED.get(name, Path(name))
    if folder.is_dir() and revision is None:
        return Tokenizer.from_folder(folder)
    return load_backbone(name, revision=revision).tokenizer


def backbone_positions(backbone: str | None, revision: str | None = None) -> int:
    """Return the longest sequence of a backbone (None: the embedded one)."""
    from mp2.backbone.load import backbone_config

    return backbone_config(backbone or "mini", revision=revision).max_positions


def token_percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Return lengths at the percentiles shown, by name ("50 %", ..., "100 %"); empty for none."""
    if not lengths:
        return {}
    values = np.percentile(lengths, PERCENTILES, method="higher")
    return {f"{p} %": int(value) for p, value in zip(PERCENTILES, values, strict=True)}


def _placeholder(card: TaskCard) -> Example:
    fields = {name: f"〈{name}〉" for name in card.fields}
    options = ("〈options[0]〉", "〈options[1]〉") if card.type == "multiple_choice" else ()
    return Example(fields, None, options)


def _gold(card: TaskCard, example: Example) -> str:
    if card.type == "classification":
        return card.labels[str(example.label)]
    if card.type == "multiple_choice":
        return example.options[int(example.label or 0)]
    return "; ".join(answer.text for answer in example.answers) or "(unanswerable)"


def source_rows() -> list[dict[str, str]]:
    """Return a record for each card of the package, in the order of SOURCE_HEAD."""
    return [dict(zip(SOURCE_HEAD, _source_row(card), strict=True)) for card in list_cards()]


def _source_row(card: TaskCard) -> tuple[str, ...]:
    source = card.source
    if card.task.startswith("demo_"):
        return (card.task, "demo", "in the package", "JSON lines", "Apache-2.0", "yes", "itself", "")
    if source is None:
        return (card.task, card.track, "none", "-", "-", "-", "-", "")
    where, form, tested = _source_kind(source)
    confirmed = "yes" if source.confirmed else "no"
    return (
        card.task,
        card.track,
        where,
        form,
        source.licence or "not stated",
        confirmed,
        tested,
        source.note,
    )


def _source_kind(source: Source) -> tuple[str, str, str]:
    """Return where, in which format, and with what stand-in its way is tested offline."""
    if source.hub:
        name = source.hub + (f" ({source.config})" if source.config else "")
        return f"hub: {name}", "rows of datasets", "a stand-in of the library"
    if source.files:
        address = next(iter(source.files.values())).split()[0]
        ending = address.rpartition(".")[2]
        form = {"lines": f"cells by {source.separator!r}", "squad": "SQuAD", "c3": "C3"}.get(
            source.format, ending
        )
        packed = " in an archive" if "#" in address else ""
        return address.split("#")[0], form + packed, "a local server"
    return f"by hand: {source.page}" if source.page else "none found", "-", "the message"


def sources_page() -> str:
    """Return the sources as a page: docs/sources.md."""
    rows = [tuple(row.values()) for row in source_rows()]
    lines = ["| " + " | ".join(SOURCE_HEAD) + " |", "|" + " --- |" * len(SOURCE_HEAD)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"

"""The baselines of a task as ``mp2 baselines`` prints them and every run stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mp2.tasks.baselines import Baseline

if TYPE_CHECKING:
    from pathlib import Path


def task_baselines(
    task: str | Path,
    *,
    data: str | None = None,
    backbone: str | None = "mini",
    seed: int = 8,
    shots: int | None = None,
    max_tokens: int | None = None,
    test_limit: int | None = None,
) -> dict[str, Any]:
    """Return the baselines on the few-shot split that ``mp2 bbt`` would draw with the same seed.

    ``backbone`` is the encoder that is probed; None: no probe. Raises ``UsageError`` for what ``mp2 bbt``
    refuses.
    """
    from mp2.backbone import load_backbone
    from mp2.runs.pooled_states import pooled_states
    from mp2.tasks import few_shot_split, has_split, load_card, load_examples
    from mp2.tasks.baselines import baselines

    card = load_card(task)
    split = few_shot_split(card, load_examples(card, "train", data), seed, shots)
    test = load_examples(card, "test", data, test_limit) if has_split(card, "test", data) else []
    states = None
    if backbone is not None:
        loaded = load_backbone(backbone)
        states = pooled_states(loaded, max_tokens or loaded.config.max_positions)
    lines = baselines(card, split.train, {"dev": split.dev, "test": test}, states)
    return {
        "task": card.task,
        "metric": card.metric,
        "seed": seed,
        "backbone": backbone,
        "examples": {"train": len(split.train), "dev": len(split.dev), "test": len(test)},
        "baselines": {line.key: line.as_dict() for line in lines},
    }


def read_baselines(stored: dict[str, dict[str, Any]]) -> list[Baseline]:
    """Return the lines of a ``result.json``."""
    return [
        Baseline(
            key,
            line["name"],
            {s: line[f"{s}_score"] for s in ("dev", "test") if line[f"{s}_score"] is not None},
            line["note"],
        )
        for key, line in stored.items()
    ]


def baseline_rows(lines: Sequence[Baseline]) -> list[tuple[str, str, str]]:
    """Return (name, dev, test) of each line as a table shows it; the reason in the place of scores."""
    rows = []
    for line in lines:
        if line.note is not None:
            rows.append((f"{line.name}: none, {line.note}", "", ""))
            continue
        dev, test = (f"{100 * line.scores[s]:.1f}" if s in line.scores else "-" for s in ("dev", "test"))
        rows.append((line.name, dev, test))
    return rows

"""The true few-shot setting: 32 examples to train, 32 to select by, from the training set (section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mp2.errors import UsageError
from mp2.tasks.card import TaskCard
from mp2.tasks.example import Example

TOTAL_SHOTS = 32  # section 4.1: "we randomly draw 32 samples"
MANY_LABELS = 5  # section 4.1: "for tasks with more than 5 labels ..."
SHOTS_PER_MANY = 8  # "... we randomly select 8 samples for each label"


@dataclass(frozen=True)
class FewShotSplit:
    """Disjoint few-shot training and development sets of the same size and label balance."""

    train: list[Example]
    dev: list[Example]


def few_shot_split(
    card: TaskCard, examples: Sequence[Example], seed: int, shots: int | None = None
) -> FewShotSplit:
    """Draw train and dev from the original training set ``examples``; the same seed draws the same.

    Classification is balanced by label: 32 in all for up to 5 labels (what does not divide goes to labels
    drawn by the seed), 8 a label above, or the card's ``shots_per_label``. Other types draw 32. ``shots``
    overrides this: a label for classification, in all for other types. Repeated examples count once. Raises
    ``UsageError`` where there are too few.
    """
    if shots is not None and shots < 1:
        raise UsageError(f"got {shots} shots, expected 1 or more")
    rng = np.random.default_rng(seed)
    distinct = list({_content(example): example for example in reversed(examples)}.values())[::-1]
    if card.type != "classification":
        return _draw(card, {None: distinct}, {None: shots or TOTAL_SHOTS}, rng)
    pools: dict[str | None, list[Example]] = {label: [] for label in card.labels}
    for example in distinct:
        pools[str(example.label)].append(example)
    return _draw(card, pools, _label_shots(card, shots, rng), rng)


def _label_shots(card: TaskCard, shots: int | None, rng: np.random.Generator) -> dict[str | None, int]:
    labels = list(card.labels)
    each = shots or card.shots_per_label or (SHOTS_PER_MANY if len(labels) > MANY_LABELS else None)
    if each is not None:
        return dict.fromkeys(labels, each)
    base, left = divmod(TOTAL_SHOTS, len(labels))
    lucky = set(rng.permutation(len(labels))[:left].tolist())
    return {label: base + (index in lucky) for index, label in enumerate(labels)}


def _draw(
    card: TaskCard,
    pools: dict[str | None, list[Example]],
    n_shots: dict[str | None, int],
    rng: np.random.Generator,
) -> FewShotSplit:
    short = [
        f"{len(pool)} of {2 * n_shots[label]}" + (f" with label '{label}'" if label is not None else "")
        for label, pool in pools.items()
        if len(pool) < 2 * n_shots[label]
    ]
    if short:
        most = min(len(pool) for pool in pools.values()) // 2
        hint = f"--shots {most} is the most this data allows" if most else "add examples"
        listed = "; ".join(short[:5]) + (f"; and {len(short) - 5} labels more" if len(short) > 5 else "")
        what = "examples" if None in pools else "examples a label"
        raise UsageError(
            f"task '{card.task}' has too few {what} to draw train and dev from: {listed}; {hint}"
        )
    train, dev = [], []
    for label, pool in pools.items():
        order = rng.permutation(len(pool))
        n = n_shots[label]
        train += [pool[i] for i in order[:n]]
        dev += [pool[i] for i in order[n : 2 * n]]
    return FewShotSplit(_shuffled(train, rng), _shuffled(dev, rng))


def _shuffled(examples: list[Example], rng: np.random.Generator) -> list[Example]:
    return [examples[i] for i in rng.permutation(len(examples))]


def _content(example: Example) -> tuple[object, ...]:
    return (*example.fields.items(), example.options)

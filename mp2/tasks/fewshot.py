"""The true few-shot setting: 32 examples to train, 32 to select by (section 4.1), or as many as there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mp2.errors import UsageError
from mp2.tasks.card import TaskCard
from mp2.tasks.example import Example

TOTAL_SHOTS = 32  # section 4.1: "we randomly draw 32 samples"
MANY_LABELS = 5  # section 4.1: "for tasks with more than 5 labels ..."
SHOTS_PER_MANY = 8  # "... we randomly select 8 samples for each label"
MIN_SHOTS = 2  # a label: one to learn from says nothing of what examples have in common

Pools = dict[str | None, list[Example]]
"""Distinct examples by label; under None those of a task without labels."""


@dataclass(frozen=True)
class FewShotSplit:
    """Disjoint few-shot training and development sets.

    ``dev`` is empty where there is nothing to select by but the training loss. ``remarks`` say what is not as
    asked for: fewer shots, a smaller dev set or none.
    """

    train: list[Example]
    dev: list[Example]
    remarks: tuple[str, ...] = ()


def few_shot_split(
    card: TaskCard,
    examples: Sequence[Example],
    seed: int,
    shots: int | None = None,
    *,
    dev_examples: Sequence[Example] = (),
    select: bool = True,
) -> FewShotSplit:
    """Draw train from the original training set ``examples``, and dev; the same seed draws the same.

    Classification is balanced by label: 32 in all for up to 5 labels (what does not divide goes to labels
    drawn by the seed, of those that have so many), 8 a label above, or the card's ``shots_per_label``. Other
    types draw 32. ``shots`` overrides this: a label for classification, in all for other types. Where there
    are fewer, all of them are taken. Repeated examples count once: a text that stands there with two labels
    has the first of them, and a remark says so.

    Dev has as many, drawn from ``dev_examples`` if there are any, else from what train does not need. It is
    left empty where ``select`` is false, or fewer than half as many are left.

    Raises ``UsageError`` where a label, or a task without labels, has fewer than 2 training examples.
    """
    if shots is not None and shots < 1:
        raise UsageError(f"got {shots} shots, expected 1 or more")
    rng = np.random.default_rng(seed)
    pools = _pools(card, examples)
    wanted: dict[str | None, int] = (
        _label_shots(card, pools, shots, rng)
        if card.type == "classification"
        else {None: shots or TOTAL_SHOTS}
    )
    _check(card, pools, wanted)
    train, left = _draw(pools, wanted, rng)
    train = _shuffled(train, rng)
    remarks = (*_at_odds(examples), *_fewer(pools, wanted))
    if not select:
        return FewShotSplit(train, [], remarks)
    if dev_examples:
        taken = {_content(example) for example in train}
        dev_pools = _pools(card, [e for e in dev_examples if _content(e) not in taken])
        dev, _ = _draw(dev_pools, wanted, rng)
        if not dev:
            raise UsageError(
                f"every dev example of task '{card.task}' is also in train; give others, or --dev none"
            )
        what = "all there are that train does not have"
    else:
        dev = [example for label, pool in left.items() for example in pool[: wanted[label]]]
        what = "all that train leaves"
        if 2 * len(dev) < len(train):
            n_all = sum(map(len, pools.values()))
            no_dev = (
                f"no dev set: train takes {len(train)} of {n_all} examples, and the {len(dev)} left are too "
                "few to select by; the training loss selects"
            )
            return FewShotSplit(train, [], (*remarks, no_dev))
    if len(dev) < len(train):
        remarks += (f"dev has {len(dev)} examples: {what}",)
    return FewShotSplit(train, _shuffled(dev, rng), remarks)


def _pools(card: TaskCard, examples: Iterable[Example]) -> Pools:
    distinct = list({_content(example): example for example in reversed(list(examples))}.values())[::-1]
    if card.type != "classification":
        return {None: distinct}
    pools: Pools = {label: [] for label in card.labels}
    for example in distinct:
        pools[str(example.label)].append(example)
    return pools


def _label_shots(
    card: TaskCard, pools: Pools, shots: int | None, rng: np.random.Generator
) -> dict[str | None, int]:
    labels = list(card.labels)
    each = shots or card.shots_per_label or (SHOTS_PER_MANY if len(labels) > MANY_LABELS else None)
    if each is not None:
        return dict.fromkeys(labels, each)
    base, left = divmod(TOTAL_SHOTS, len(labels))
    order = sorted(rng.permutation(len(labels)).tolist(), key=lambda i: len(pools[labels[i]]) <= base)
    lucky = set(order[:left])
    return {label: base + (index in lucky) for index, label in enumerate(labels)}


def _check(card: TaskCard, pools: Pools, wanted: dict[str | None, int]) -> None:
    short = [
        f"{len(pool)}" + (f" with label '{label}'" if label is not None else "")
        for label, pool in pools.items()
        if len(pool) < min(MIN_SHOTS, wanted[label])
    ]
    if short:
        each, ways = "", "add examples"
        if None not in pools:
            each = " of each label"
            ways = "add examples, or take the label out of the card and its examples out of the data"
        raise UsageError(
            f"task '{card.task}' has too few different training examples: {_listed(short)}; "
            f"expected at least {MIN_SHOTS}{each}, better {max(wanted.values())}; {ways}"
        )


def _draw(
    pools: Pools, wanted: dict[str | None, int], rng: np.random.Generator
) -> tuple[list[Example], Pools]:
    """Return the examples drawn, and what is left of each pool in the order of the draw."""
    drawn, left = [], {}
    for label, pool in pools.items():
        order = rng.permutation(len(pool))
        drawn += [pool[i] for i in order[: wanted[label]]]
        left[label] = [pool[i] for i in order[wanted[label] :]]
    return drawn, left


def _fewer(pools: Pools, wanted: dict[str | None, int]) -> tuple[str, ...]:
    short = [
        f"{len(pool)} of {wanted[label]}" + (f" with label '{label}'" if label is not None else "")
        for label, pool in pools.items()
        if len(pool) < wanted[label]
    ]
    return (f"train has fewer examples than asked for: {_listed(short)}",) if short else ()


def _at_odds(examples: Iterable[Example]) -> tuple[str, ...]:
    """Say which examples stand there again with another label."""
    labels: dict[tuple[object, ...], dict[str | int | None, int]] = {}
    for example in examples:
        if example.label is not None:
            labels.setdefault(_content(example), {}).setdefault(example.label, example.source_line)
    found = [lines for lines in labels.values() if len(lines) > 1]
    if not found:
        return ()
    of_first = ", ".join(f"{label} in line {line}" for label, line in found[0].items())
    what = "1 example has" if len(found) == 1 else f"{len(found)} examples have"
    return (f"{what} several labels in the training data, the first of which is taken: {of_first}",)


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:5]) + (f", and {len(parts) - 5} labels more" if len(parts) > 5 else "")


def _shuffled(examples: list[Example], rng: np.random.Generator) -> list[Example]:
    return [examples[i] for i in rng.permutation(len(examples))]


def n_also_in(others: Iterable[Example], examples: Iterable[Example]) -> int:
    """Return how many of ``examples`` are the same, but for the label, as one of ``others``."""
    seen = {_content(example) for example in others}
    return sum(_content(example) in seen for example in examples)


def _content(example: Example) -> tuple[object, ...]:
    """Return what makes examples the same: everything but the label."""
    return (*example.fields.items(), example.options)

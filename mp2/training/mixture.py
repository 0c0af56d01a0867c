"""The multi-task mixture: formatted upstream examples and the sampling of batches from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mp2.backbone.tokenizer import Tokenizer
from mp2.errors import UsageError
from mp2.tasks import Example, MrcFormatter, MrcInput, TaskCard, load_examples

_POOL = 4  # batches drawn together and cut by length, so that padding stays small


@dataclass(frozen=True)
class MixtureTask:
    """One task: its card, training inputs with a gold span, and dev examples with all their inputs."""

    card: TaskCard
    train: Sequence[MrcInput]
    dev_examples: Sequence[Example]
    dev: Sequence[MrcInput]

    def train_sha256(self) -> str:
        """Hash of what is trained on: tokens and gold spans, in their order."""
        return _digest(self.train).hexdigest()

    def dev_sha256(self) -> str:
        """Hash of what dev scores depend on: inputs with all their spans, examples, the metric."""
        digest = _digest(self.dev)
        for item in self.dev:
            digest.update(repr([item.example, item.context_span, item.context_offsets]).encode())
            digest.update(item.option_spans.tobytes())
        for example in self.dev_examples:
            digest.update(repr([example.fields, example.label, example.options, example.answers]).encode())
        digest.update(self.card.metric.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Batch:
    """Token ids and mask [N, T], gold spans [N] and shares in the mean loss [N], all of one task."""

    task: int
    input_ids: Tensor
    mask: Tensor
    start: Tensor
    end: Tensor
    weight: Tensor

    def part(self, rank: int, size: int) -> Batch:
        """The rows of process ``rank`` of ``size``; weights stay shares of the whole batch.

        A process without a row (fewer rows than processes) gets the first one at weight zero, because all
        processes must take part in every step.
        """
        if size == 1:
            return self
        rows = torch.arange(rank, len(self.start), size)
        weight = self.weight[rows]
        if not len(rows):
            rows, weight = torch.tensor([0]), torch.zeros(1)
        longest = int(self.mask[rows].sum(1).max())
        ids, mask = self.input_ids[rows, :longest], self.mask[rows, :longest]
        return Batch(self.task, ids, mask, self.start[rows], self.end[rows], weight)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        tensors = (self.input_ids, self.mask, self.start, self.end, self.weight)
        return Batch(self.task, *(tensor.to(device) for tensor in tensors))


def _digest(inputs: Sequence[MrcInput]) -> hashlib._Hash:
    digest = hashlib.sha256()
    for item in inputs:
        digest.update(np.array([item.n_tokens, item.start, item.end], np.int64).tobytes())
        digest.update(item.input_ids.tobytes())
    return digest


def load_mixture(
    cards: Sequence[TaskCard],
    data: Path | None,
    tokenizer: Tokenizer,
    max_tokens: int,
    *,
    dev_limit: int,
    rotated: bool = False,
    shuffle_options: bool = False,
    seed: int = 0,
    log: Callable[[str], None],
) -> list[MixtureTask]:
    """Format every task's training split; a task whose options cannot fit ``max_tokens`` is left out.

    With ``rotated``, every classification task comes a second time, as ``<task>_rotated``: same text, same
    options, and the answer is the option after the right one (with two labels: the other one). Only the
    prompts can tell the two apart. With ``shuffle_options``, each training example of a classification task
    has its options in an order of its own (drawn from ``seed``); dev examples keep the card's.

    Raises:
        UsageError: no task is left.
    """
    tasks = []
    twins = [(card, card) for card in cards]
    if rotated:
        twins += [(card, rotate(card)) for card in cards if card.type == "classification"]
    for source, card in twins:
        try:
            formatter = MrcFormatter(card, tokenizer, max_tokens)
            plain = MrcFormatter(source, tokenizer, max_tokens)
        except UsageError as error:
            log(f"left out: {error}")
            continue
        examples = load_examples(source, "train", data)
        orders = _orders(source, len(examples), seed) if shuffle_options else None
        train = [
            plain.training_input(
                example, i, order=orders[i] if orders else None, rotation=int(card is not source)
            )
            for i, example in enumerate(examples)
            if plain.fits(example)
        ]
        dev = [e for e in load_examples(source, "dev", data, dev_limit) if formatter.fits(e)]
        inputs = [x for i, example in enumerate(dev) for x in formatter.inputs(example, i)]
        if train and dev:
            tasks.append(MixtureTask(card, train, dev, inputs))
        else:
            log(f"left out: task '{card.task}' has no example that fits {max_tokens} tokens")
    if not tasks:
        raise UsageError(f"none of the {len(cards)} tasks can be trained on within {max_tokens} tokens")
    return tasks


def _orders(card: TaskCard, n_examples: int, seed: int) -> list[list[int]] | None:
    """An order of the label words for each example; None where options are not label words."""
    if card.type != "classification":
        return None
    rng = np.random.default_rng([seed, 5, *card.task.encode()])
    return [rng.permutation(len(card.labels)).tolist() for _ in range(n_examples)]


def rotate(card: TaskCard) -> TaskCard:
    """Return a card whose labels have the next label's word each; the options stay in their order."""
    labels, words = list(card.labels), list(card.labels.values())
    rotated = dict(zip([labels[-1], *labels[:-1]], words, strict=True))
    return replace(card, task=f"{card.task}_rotated", labels=rotated)


def pad(inputs: Sequence[MrcInput], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids [N, T] and mask [N, T], padded to the longest."""
    ids = np.full((len(inputs), max(x.n_tokens for x in inputs)), pad_id, np.int64)
    mask = np.zeros(ids.shape, bool)
    for row, item in enumerate(inputs):
        ids[row, : item.n_tokens] = item.input_ids
        mask[row, : item.n_tokens] = True
    return ids, mask


def sample_batch(
    tasks: Sequence[MixtureTask], step: int, *, batch_size: int, seed: int, pad_id: int
) -> Batch:
    """The batch of a step, on the CPU: a task drawn uniformly, then examples of it.

    Depends on (seed, step) alone, so that a resumed run draws what the unbroken one would have. A pool of
    four batches is drawn and split by length; every example has the same chance.
    """
    rng = np.random.default_rng([seed, 3, step])
    task = int(rng.integers(len(tasks)))  # section 3.3: tasks, not examples, are drawn uniformly
    train = tasks[task].train
    size = min(batch_size, len(train))
    n_parts = min(_POOL, len(train) // size)
    pool = rng.choice(len(train), size * n_parts, replace=False)
    pool = pool[np.argsort([train[i].n_tokens for i in pool], kind="stable")]
    part = int(rng.integers(n_parts))
    chosen = [train[i] for i in pool[part * size : (part + 1) * size]]
    ids, mask = pad(chosen, pad_id)
    return Batch(
        task,
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        torch.tensor([x.start for x in chosen]),
        torch.tensor([x.end for x in chosen]),
        torch.full((size,), 1 / size),
    )

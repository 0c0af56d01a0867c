"""A backbone with modular prompts on it: the loss of its span head, and dev scores of a mixture's tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mp2.backbone.encoder import Encoder
from mp2.heads import span_scores
from mp2.prompts import ModularPrompts
from mp2.tasks import decode, score
from mp2.training.mixture import Batch, MixtureTask, pad
from mp2.training.mlm import trainable_attention
from mp2.training.ranks import Ranks


def span_losses(start_logits: Tensor, end_logits: Tensor, mask: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Losses [N] of sequences: (start + end cross-entropy) / 2 over real positions; padding is masked."""
    start_logits = start_logits.float().masked_fill(~mask, -torch.inf)
    end_logits = end_logits.float().masked_fill(~mask, -torch.inf)
    return (
        F.cross_entropy(start_logits, start, reduction="none")
        + F.cross_entropy(end_logits, end, reduction="none")
    ) / 2


def span_loss(start_logits: Tensor, end_logits: Tensor, mask: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Mean of ``span_losses`` over the batch."""
    return span_losses(start_logits, end_logits, mask, start, end).mean()


@contextmanager
def in_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Run forward passes of the block in ``precision``: fp32, or bf16 by autocast.

    Under bf16 with the attention whose backward pass is quick on CPUs; in fp32 it gains nothing.
    """
    if precision == "fp32":
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), trainable_attention(device):
        yield


class PromptedEncoder(nn.Module):
    """A backbone with modular prompts on it; ``encoder`` may be frozen."""

    def __init__(self, encoder: Encoder, prompts: ModularPrompts) -> None:
        super().__init__()
        self.encoder = encoder
        self.prompts = prompts

    def forward(self, batch: Batch, temperature: float, noise: torch.Generator) -> Tensor:
        """Loss of a batch, its sequences weighted by ``batch.weight``, under a relaxed router sample."""
        weights = self.prompts.router_weights(batch.task, temperature=temperature, generator=noise)
        start, end = self.prompts(self.encoder, batch.input_ids, batch.mask, weights)
        return (span_losses(start, end, batch.mask, batch.start, batch.end) * batch.weight).sum()


@torch.no_grad()
def dev_score(
    model: PromptedEncoder, task: MixtureTask, weights: Tensor, pad_id: int, batch: int = 64
) -> float:
    """Metric of a task on its dev examples under router weights [L', K]; between 0 and 1."""
    device = weights.device
    order = np.argsort([x.n_tokens for x in task.dev], kind="stable")
    scores: list[Any] = [None] * len(order)
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        ids, mask_np = pad([task.dev[i] for i in rows], pad_id)
        mask = torch.from_numpy(mask_np).to(device)
        logits = model.prompts(model.encoder, torch.from_numpy(ids).to(device), mask, weights)
        logp = torch.stack([x.float().masked_fill(~mask, -torch.inf).log_softmax(-1) for x in logits], -1)
        for output, i in zip(logp.cpu().numpy(), rows, strict=True):
            scores[i] = span_scores(task.dev[i], output)
    found = decode(task.card, task.dev_examples, task.dev, scores)
    return score(task.card, [x.prediction for x in found], task.dev_examples)


def dev_scores(
    model: PromptedEncoder, tasks: Sequence[MixtureTask], pad_id: int, ranks: Ranks
) -> dict[str, float]:
    """Dev metric of every task under its inference router; the processes share the tasks."""
    model.eval()
    scores = [0.0] * len(tasks)
    for i in range(ranks.rank, len(tasks), ranks.size):
        scores[i] = dev_score(model, tasks[i], model.prompts.router_weights(i).detach(), pad_id)
    names = [task.card.task for task in tasks]
    return dict(zip(names, ranks.total(*scores), strict=True))


def table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Scores in per cent, a line a task, largest gain from the first column to the last one first."""
    columns = list(next(iter(scores.values())))
    rows = sorted(scores.items(), key=lambda item: item[1][columns[0]] - item[1][columns[-1]])
    width = max(20, *(len(name) for name in scores))
    lines = ["task".ljust(width) + "".join(f" {column:>9}" for column in columns)]
    for name, values in rows:
        lines.append(name.ljust(width) + "".join(f" {100 * values[c]:9.1f}" for c in columns))
    means = [100 * float(np.mean([values[c] for values in scores.values()])) for c in columns]
    lines.append("mean".ljust(width) + "".join(f" {mean:9.1f}" for mean in means))
    return "\n".join(lines)

"""Which head a run reads its answers with (``--head``), and why.

``span`` is the paper's and was trained with the prompts. ``mlm`` is the checkpoint's own head of masked
language modelling. ``ridge`` is fitted in closed form to the few-shot examples. ``auto`` compares those that
are there by what they make of the training examples before anything is tuned: the cross-entropy over the
labels, for ridge of predictions that leave each example out. Dev and test have no say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mp2.errors import UsageError

if TYPE_CHECKING:
    from mp2.engine import Backend
    from mp2.heads import Head
    from mp2.prompts import PromptSet
    from mp2.tasks import Example, MrcInput, TaskCard

HEADS = ("auto", "span", "mlm", "ridge")
RIDGE_FEATURES = ("states+ngrams", "states")


class Formatter(Protocol):
    """Writes examples as token sequences for one kind of head."""

    def training_inputs(self, example: Example, index: int) -> list[MrcInput]:
        """The sequences to train on."""
        ...

    def inputs(self, example: Example, index: int) -> list[MrcInput]:
        """The sequences to predict on."""
        ...

    def fits(self, example: Example) -> bool:
        """Whether the example can be written."""
        ...


@dataclass(frozen=True)
class HeadChoice:
    """A head for a training set, and the reason for it."""

    kind: str
    head: Head
    train_inputs: list[MrcInput]
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """What config.json and result.json say of it."""
        from mp2.heads import RidgeHead

        found: dict[str, Any] = {"kind": self.kind, "reason": self.reason}
        if isinstance(self.head, RidgeHead):
            found |= asdict(self.head.settings)
        return found


class HeadChooser:
    """Makes heads for one training set under one model."""

    def __init__(
        self,
        card: TaskCard,
        backend: Backend,
        prompts: PromptSet,
        formatter: Callable[[str], Formatter],
        train: Sequence[Example],
        features: str,
    ) -> None:
        """``formatter(kind)`` writes examples for a kind of head; ``features`` is one of RIDGE_FEATURES."""
        self._card, self._backend, self._prompts = card, backend, prompts
        self._formatter, self._train, self._features = formatter, list(train), features

    def choose(self, kind: str) -> HeadChoice:
        """The head of ``kind``; for ``auto`` the one with the lowest loss.

        Raises:
            UsageError: the task or the backbone has no such head, or none at all.
        """
        if kind == "span":
            if not self._prompts.has_span_head:
                raise UsageError(
                    "these prompts have no span head, which is trained with pre-trained prompts: use --head "
                    "auto, ridge or mlm, or give --prompts of 'mp2 pretrain'"
                )
            return self._span("asked for")
        if kind == "mlm":
            return self._mlm("asked for")[1]
        if kind == "ridge":
            return self._ridge("asked for")[1]
        return self._best()

    def _best(self) -> HeadChoice:
        if self._card.type != "classification":
            if not self._prompts.has_span_head:
                raise UsageError(
                    f"task '{self._card.task}' is {self._card.type.replace('_', ' ')}, which only the span "
                    "head reads, and that comes with pre-trained prompts: give --prompts of 'mp2 pretrain'"
                )
            return self._span("the only head for this type of task")
        found = [self._ridge("")]
        if self._prompts.has_span_head:
            found.append((self._span_loss(), self._span("")))
        elif self._backend.backbone.mlm_head is not None:
            try:
                found.append(self._mlm(""))
            except UsageError as error:  # label words that the vocabulary cannot spell, a cloze too long
                found.append((float("inf"), HeadChoice("mlm", found[0][1].head, [], str(error))))
        loss, best = min(found, key=lambda pair: pair[0])
        others = ", ".join(f"{other.kind} {value:.3f}" for value, other in found if other is not best)
        reason = f"lowest training loss before tuning ({best.kind} {loss:.3f}" + (
            f"; {others})" if others else "; no other head for this backbone)"
        )
        return HeadChoice(best.kind, best.head, best.train_inputs, reason)

    def _inputs(self, kind: str) -> list[MrcInput]:
        formatter = self._formatter(kind)
        return [made for i, e in enumerate(self._train) for made in formatter.training_inputs(e, i)]

    def _untuned(self) -> np.ndarray:
        """The prompt with every module on, z [L', d]."""
        import torch

        z: np.ndarray = self._prompts.fuse(torch.ones(self._prompts.z.shape[:2])).detach().cpu().numpy()
        return z

    def _span(self, reason: str) -> HeadChoice:
        from mp2.heads import SpanHead

        head = SpanHead(self._prompts.span_weight, self._prompts.span_bias)
        return HeadChoice("span", head, self._inputs("span"), reason)

    def _span_loss(self) -> float:
        """Cross-entropy over the labels under the best router that is known before any search.

        Those are the one with every module on and the pre-training tasks' own: on a new task a router of a
        related one is where the search begins.
        """
        import torch

        from mp2.engine import Scorer
        from mp2.heads import SpanHead
        from mp2.prompts import hard_router

        head = SpanHead(self._prompts.span_weight, self._prompts.span_bias)
        scorer = Scorer(self._backend.forward(self._prompts, head))
        inputs = self._inputs("span")
        routers = [torch.ones(self._prompts.z.shape[:2]), *hard_router(self._prompts.routers).float()]
        losses = []
        for router in routers:
            z = self._prompts.fuse(router).detach().cpu().numpy()
            outputs = scorer.outputs(z, inputs).fetch()
            rows = [head.scores(item, output) for item, output in zip(inputs, outputs, strict=True)]
            gold = [
                np.logaddexp.reduce(row) - row[item.label] for row, item in zip(rows, inputs, strict=True)
            ]
            losses.append(float(np.mean(gold)))
        return min(losses)

    def _mlm(self, reason: str) -> tuple[float, HeadChoice]:
        from mp2.engine import Objective
        from mp2.heads import LabelWordHead
        from mp2.tasks import label_words

        mlm = self._backend.backbone.mlm_head
        if mlm is None:
            raise UsageError(
                f"the checkpoint of backbone '{self._backend.backbone.name}' has no masked-language-model "
                "head: use --head ridge"
            )
        inputs = self._inputs("mlm")
        words = label_words(self._card, self._backend.backbone.tokenizer)
        head = LabelWordHead(mlm, words, inputs)
        objective = Objective(self._backend.forward(self._prompts, head), inputs)
        (loss,) = objective.full_losses(self._untuned()[None]).fetch()
        return float(loss), HeadChoice("mlm", head, inputs, reason)

    def _ridge(self, reason: str) -> tuple[float, HeadChoice]:
        """The layer, penalty and temperature with the lowest leave-one-out loss at the untuned prompt."""
        from mp2.engine import Objective
        from mp2.heads import RidgeHead, RidgeSettings

        inputs = self._inputs("ridge")
        best: tuple[float, RidgeHead] | None = None
        for layer in range(1, self._backend.backbone.config.n_layers + 1):  # no prompt moves the embeddings
            settings = RidgeSettings(
                layer=layer, penalty=1.0, temperature=1.0, ngrams=self._features == "states+ngrams"
            )
            head = RidgeHead(inputs, len(self._card.labels), settings)
            objective = Objective(self._backend.forward(self._prompts, head), inputs)
            found = head.with_best_settings(objective.training_outputs(self._untuned()))
            best = found if best is None or found[0] < best[0] else best
        assert best is not None
        return best[0], HeadChoice("ridge", best[1], inputs, reason)

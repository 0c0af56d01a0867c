"""Which head a run reads its answers with (``--head``), and why.

``span`` is the paper's, was trained with the prompts, and is taken where they have one. ``mlm`` is the
checkpoint's own head of masked language modelling. ``ridge`` is fitted in closed form to the few-shot
examples. Between these two, ``auto`` takes the one with the lower loss on the training examples before
anything is tuned: the cross-entropy over the labels, for ridge of predictions that leave each example out.
Dev and test have no say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mp2.errors import UsageError

if TYPE_CHECKING:
    from mp2.engine import Backend
    from mp2.heads import Head
    from mp2.prompts import PromptSet
    from mp2.tasks import Example, MrcInput, TaskCard


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
        """``formatter(kind)`` writes examples for a kind of head; ``features``: states+ngrams, or states."""
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
        if self._prompts.has_span_head:
            return self._span("the head of the pre-trained prompts")
        if self._card.type != "classification":
            raise UsageError(
                f"task '{self._card.task}' is {self._card.type.replace('_', ' ')}, which only the span head "
                "reads, and that comes with pre-trained prompts: give --prompts of 'mp2 pretrain'"
            )
        loss, best = self._ridge("")
        if self._backend.backbone.mlm_head is None:
            return replace(best, reason="the prompts have no span head, and the checkpoint no other")
        try:
            other_loss, other = self._mlm("")
        except UsageError as error:  # label words that cannot be spelled, no room for the cloze
            return replace(best, reason=f"mlm cannot read this task ({error})")
        if other_loss < loss:
            (loss, best), (other_loss, other) = (other_loss, other), (loss, best)
        reason = f"training loss before tuning {loss:.3f}, of {other.kind} {other_loss:.3f}"
        return replace(best, reason=reason)

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

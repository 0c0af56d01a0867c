"""Which head a run reads its answers with (``--head``), and why.

``span`` is the paper's and was trained with the prompts. ``mlm`` is the checkpoint's own head of masked
language modelling. ``ridge`` is fitted in closed form to the few-shot examples. ``auto`` compares losses on
the training examples before anything is tuned, the cross-entropy over the labels; dev and test have no say.

- ridge's losses are those of predictions that leave each example out;
- of pre-trained prompts the span head is given the best prompt known, the untuned one or that of any task it
  was pre-trained on, and one temperature: its losses are not calibrated as ridge's are. It is taken where it
  is better by more than two standard errors of the mean difference: the best of many known prompts is good on
  a few examples by chance, too. Else ridge is, as it is where the span head cannot read the task: where its
  options take all the room, or a label word has no tokens;
- where no prompts were pre-trained, label words and ridge are compared, and the lower loss is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mp2.errors import UsageError

if TYPE_CHECKING:
    from mp2.backbone import Backbone
    from mp2.backbone.mlm_head import MlmHead
    from mp2.engine import Backend
    from mp2.heads import Head
    from mp2.prompts import PromptSet
    from mp2.tasks import Example, MrcInput, TaskCard


N_ERRORS = 2  # standard errors by which a span head must be better than ridge
N_TRIED, N_KEPT = 16, 4  # examples that every known prompt is tried on, prompts that are tried on more
N_COMPARED = 64  # examples, up to twice as many, that a span head is compared with ridge on
ASKED_FOR = "asked for"
"""The reason of a head that ``--head`` names."""


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
    compared: bool = False  # whether ridge was asked, too, and not taken

    def as_dict(self) -> dict[str, Any]:
        """What config.json and result.json say of it."""
        from mp2.heads import LabelWordHead, RidgeHead

        found: dict[str, Any] = {"kind": self.kind, "reason": self.reason}
        if isinstance(self.head, LabelWordHead):
            found["sha256"] = self.head.sha256  # the backbone's hash is of the encoder alone
        if isinstance(self.head, RidgeHead):
            found |= asdict(self.head.settings) | {"parts": [asdict(x) for x in self.head.settings.parts]}
        return found


def asked_head(kind: str, card: TaskCard, has_span_head: bool, backbone: Callable[[], Backbone]) -> str:
    """The head whose sequences a run makes first: of ``auto`` the one that is compared with others.

    ``backbone`` loads it, where it matters whether the checkpoint has a head of its own.

    Raises:
        UsageError: prompts or checkpoint have no such head, or none that reads this type of task.
    """
    if kind == "span" and not has_span_head:
        raise UsageError(
            "these prompts have no span head, which is trained with pre-trained prompts: use --head "
            "auto, ridge or mlm, or give --prompts of 'mp2 pretrain'"
        )
    if kind == "mlm":
        mlm_head_of(backbone())
    if kind != "auto":
        return kind
    if has_span_head:
        return "span"
    if card.type == "multiple_choice" and backbone().mlm_head is not None:
        return "mlm"
    if card.type != "classification":
        raise UsageError(
            f"task '{card.task}' is {card.type.replace('_', ' ')}, which is read by the span "
            "head of pre-trained prompts: give --prompts of 'mp2 pretrain'"
        )
    return "ridge"


def possible_heads(
    kind: str, card: TaskCard, has_span_head: bool, backbone: Callable[[], Backbone]
) -> list[str]:
    """The heads that a run with ``--head kind`` may take, the one of `asked_head` first.

    One that cannot read the task is out; where that is the first, it must be the span head. Raises what
    `asked_head` does.
    """
    first = asked_head(kind, card, has_span_head, backbone)
    if kind != "auto" or card.type != "classification":
        return [first]
    if first == "span":
        return [first, "ridge"]
    return [first] if backbone().mlm_head is None else [first, "mlm"]


def mlm_head_of(backbone: Backbone) -> MlmHead:
    """The checkpoint's own head; raises ``UsageError`` where it has none."""
    if backbone.mlm_head is None:
        raise UsageError(
            f"the checkpoint of backbone '{backbone.name}' has no masked-language-model head: use --head "
            "ridge"
        )
    return backbone.mlm_head


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

    def choose(self, kind: str, reason: str = ASKED_FOR) -> HeadChoice:
        """The head of ``kind``, ``reason`` with it; for ``auto`` the one that seems best, and why.

        Raises:
            UsageError: the task or the backbone has no such head, or none at all.
        """
        asked_head(kind, self._card, self._prompts.has_span_head, lambda: self._backend.backbone)
        if kind == "span":
            return self._span(reason)
        if kind == "mlm":
            return self._mlm(reason)[1]
        if kind == "ridge":
            return self._ridge(reason)[1]
        return self._span_or_ridge() if self._prompts.has_span_head else self._ridge_or_mlm()

    def _span_or_ridge(self) -> HeadChoice:
        if self._card.type != "classification":
            return self._span("the head of the pre-trained prompts; ridge is for classification")
        try:
            step = max(1, len(self._train) // N_COMPARED)
            span, losses, n_known = self._best_known_span(step)
        except UsageError as error:  # a label word that cannot be spelled, no room for the options
            try:
                return self._ridge(f"the span head cannot read this task: {error}")[1]
            except UsageError:
                raise error from None
        try:
            others, ridge = self._ridge("")
        except UsageError as error:  # no room for the fields
            return replace(span, reason=f"ridge cannot read this task ({error})")
        others = others[::step]
        gain = losses - others  # of ridge
        margin = float(N_ERRORS * np.std(gain, ddof=1) / np.sqrt(len(gain)))
        loss, other = losses.mean(), others.mean()
        known = f"{loss:.3f} under the best of {n_known} known prompts"
        if gain.mean() < -margin:
            reason = (
                f"training loss {known}, of ridge {other:.3f}: better by two standard errors, {margin:.3f}"
            )
            return replace(span, reason=reason, compared=True)
        reason = f"leave-one-out loss {other:.3f}, of the span head {known}"
        if gain.mean() < 0:
            reason = f"{reason}: not better by two standard errors, {margin:.3f}"
        return replace(ridge, reason=reason)

    def _ridge_or_mlm(self) -> HeadChoice:
        if self._card.type == "multiple_choice":
            return self._mlm("letters of the options: the only head for multiple choice without prompts")[1]
        losses, best = self._ridge("")
        loss = float(losses.mean())
        if self._backend.backbone.mlm_head is None:
            return replace(best, reason="the prompts have no span head, and the checkpoint no other")
        try:
            other_loss, other = self._mlm("")
        except UsageError as error:  # label words that cannot be spelled, no room for the cloze
            return replace(best, reason=f"mlm cannot read this task ({error})")
        if other_loss < loss:
            (loss, best), (other_loss, other) = (other_loss, other), (loss, best)
        reason = f"training loss before tuning {loss:.3f}, of {other.kind} {other_loss:.3f}"
        return replace(best, reason=reason, compared=best.kind != "ridge")

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

    def _best_known_span(self, step: int) -> tuple[HeadChoice, np.ndarray, int]:
        """The span head, its losses of every ``step``-th example under the best prompt known; of how many.

        The losses are the cross-entropies over the options, with one temperature. All prompts are tried on
        a few examples, and the best of them on those that are compared.
        """
        import torch

        from mp2.engine import Scorer
        from mp2.prompts import hard_router
        from mp2.tasks.calibration import answer_rows, cross_entropies, fitted_temperature

        choice = self._span("")
        scorer = Scorer(self._backend.forward(self._prompts, choice.head))
        routers = torch.unique(hard_router(self._prompts.routers), dim=0)
        prompts = [
            self._untuned(),
            *(self._prompts.fuse(router).detach().cpu().numpy() for router in routers),
        ]

        def losses(z: np.ndarray, step: int) -> np.ndarray:
            inputs = [replace(item, example=i) for i, item in enumerate(choice.train_inputs[::step])]
            outputs = scorer.outputs(z, inputs).fetch()
            scores = [choice.head.scores(*pair) for pair in zip(inputs, outputs, strict=True)]
            rows, gold = answer_rows(inputs, scores)
            return cross_entropies(rows, gold, fitted_temperature(rows, gold))

        few = max(1, len(choice.train_inputs) // N_TRIED)
        prompts.sort(key=lambda z: losses(z, few).mean())
        found = [losses(z, step) for z in prompts[:N_KEPT]]
        return choice, min(found, key=np.mean), len(prompts)

    def _mlm(self, reason: str) -> tuple[float, HeadChoice]:
        from mp2.engine import Objective
        from mp2.heads import LabelWordHead
        from mp2.tasks.cloze import answer_words

        mlm = mlm_head_of(self._backend.backbone)
        inputs = self._inputs("mlm")
        words = answer_words(self._card, self._backend.backbone.tokenizer)
        head = LabelWordHead(mlm, words, inputs)
        objective = Objective(self._backend.forward(self._prompts, head), inputs)
        (loss,) = objective.full_losses(self._untuned()[None]).fetch()
        return float(loss), HeadChoice("mlm", head, inputs, reason)

    def _ridge(self, reason: str) -> tuple[np.ndarray, HeadChoice]:
        """The layer and the regressions that the leave-one-out losses at the untuned prompt ask for.

        With the losses [N] of the examples.
        """
        from mp2.engine import Objective
        from mp2.heads import RidgeHead, RidgeSettings

        inputs = self._inputs("ridge")
        best: tuple[float, RidgeHead, np.ndarray] | None = None
        for layer in range(1, self._backend.backbone.config.n_layers + 1):  # no prompt moves the embeddings
            settings = RidgeSettings(layer=layer, ngrams=self._features == "states+ngrams")
            head = RidgeHead(inputs, len(self._card.labels), settings)
            objective = Objective(self._backend.forward(self._prompts, head), inputs)
            outputs = objective.training_outputs(self._untuned())
            loss, chosen = head.with_best_settings(outputs)
            if best is None or loss < best[0]:
                best = loss, chosen, chosen.example_losses(outputs)
        assert best is not None
        return best[2], HeadChoice("ridge", best[1], inputs, reason)

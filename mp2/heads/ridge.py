"""A closed-form head for classification over any encoder: kernel ridge regression on pooled states.

The hidden states of one layer are averaged over each text field; ridge regression maps them to the labels,
fitted to the few-shot examples in closed form, no gradients. What the search lowers is the leave-one-out
cross-entropy of its scores (`mp2.heads.leave_one_out`): a candidate prompt is good if it makes each example
predictable from the others. At the untuned prompt this is a linear probe. Token n-grams may stand beside the
states, as a second kernel of more weight: they do not depend on the prompt, and know words that
the encoder averages away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mp2.heads.head import States
from mp2.heads.leave_one_out import best_settings, centred, cross_entropy, dual
from mp2.heads.ngrams import LONGEST, NgramFeatures
from mp2.tasks.calibration import fitted_temperature

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

Floats = NDArray[np.float64]
STATES_SHARE = 0.15  # of the kernel, beside n-grams; dev/log.md has what other shares gave


@dataclass(frozen=True, kw_only=True)
class RidgeSettings:
    """What is chosen once, at the untuned prompt, by the leave-one-out loss."""

    layer: int  # whose states are pooled: 0 the embeddings, L the last layer's output
    penalty: float
    temperature: float
    ngrams: bool  # whether token n-grams stand beside the states

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> RidgeSettings:
        """The settings in a head's metadata; KeyError where one is missing."""
        return cls(**{f.name: stored[f.name] for f in fields(cls)})


class RidgeHead:
    """The head of one few-shot training set; `fit` gives the one that answers."""

    def __init__(self, train: Sequence[MrcInput], n_labels: int, settings: RidgeSettings) -> None:
        """Take the training inputs, each with its ``label``, and the choices made."""
        self.settings = settings
        self._train, self._n_labels = list(train), n_labels
        self._labels = torch.tensor([item.label for item in self._train])
        self._targets = torch.nn.functional.one_hot(self._labels, n_labels).double()
        texts = [fields_of(item) for item in self._train]
        self._ngrams = NgramFeatures.of(texts) if settings.ngrams else None
        self._known: Tensor | None = None  # the n-grams' centred kernel [N, N]
        if self._ngrams is not None:
            rows = torch.from_numpy(np.stack([self._ngrams(text) for text in texts]))
            self._known = centred((rows @ rows.T)[None])[0]

    @property
    def layer(self) -> int:
        """See `Head.layer`."""
        return self.settings.layer

    def to(self, device: torch.device) -> RidgeHead:
        """See `Head.to`: it has no weights."""
        return self

    def targets(self, inputs: Sequence[MrcInput]) -> NDArray[np.int64]:
        """Return the first and last tokens of each input's fields [N, 2 S]."""
        return np.stack([item.segments for item in inputs]).reshape(len(inputs), -1)

    def training_outputs(self, states: States) -> Tensor:
        """Return pooled features [p, n, F], float32."""
        return pooled(states)

    def scoring_outputs(self, states: States) -> Tensor:
        """Return what `training_outputs` does: the head that `fit` gives turns it into scores."""
        return pooled(states)

    def losses(self, outputs: NDArray[np.floating]) -> Floats:
        """Leave-one-out cross-entropy [P] of features [P, N, F]."""
        _, scores = dual(self._kernel(outputs), self._targets, self.settings.penalty)
        losses: Floats = cross_entropy(scores, self._labels, self.settings.temperature).numpy()
        return losses

    def example_losses(self, outputs: NDArray[np.floating]) -> Floats:
        """Leave-one-out cross-entropies [N] of features [N, F]; `losses` is their mean."""
        _, scores = dual(self._kernel(outputs[None]), self._targets, self.settings.penalty)
        log_probs = torch.log_softmax(self.settings.temperature * scores[0], -1)
        found: Floats = -log_probs[torch.arange(len(self._labels)), self._labels].numpy()
        return found

    def with_best_settings(self, outputs: NDArray[np.floating]) -> tuple[float, RidgeHead]:
        """(Leave-one-out loss, head) with the penalty and temperature that suit features [N, F] best."""
        kernel = self._kernel(outputs[None])[0]
        loss, penalty, temperature = best_settings(kernel, self._labels, self._n_labels)
        settings = replace(self.settings, penalty=penalty, temperature=temperature)
        return loss, RidgeHead(self._train, self._n_labels, settings)

    def fit(self, outputs: Callable[[], NDArray[np.floating]]) -> FittedRidge:
        """Return the regression that was fitted to all training examples under one prompt.

        Its temperature is the one that suits the leave-one-out scores under this prompt.
        """
        features = torch.from_numpy(np.asarray(outputs(), dtype=np.float64))
        weights, left_out = dual(self._kernel(features.numpy()[None]), self._targets, self.settings.penalty)
        temperature = 1 / fitted_temperature(list(left_out[0].numpy()), self._labels.tolist())
        share = 1.0 if self._ngrams is None else STATES_SHARE
        mean_target = self._targets.mean(0)
        state_weight, state_bias = _primal(features, weights[0], share)
        fitted = FittedRidge(
            settings=replace(self.settings, temperature=temperature),
            state_weight=state_weight,
            bias=(mean_target - state_bias).numpy(),
        )
        if self._ngrams is None:
            return fitted
        rows = torch.from_numpy(np.stack([self._ngrams(fields_of(item)) for item in self._train]))
        ngram_weight, ngram_bias = _primal(rows, weights[0], 1 - STATES_SHARE)
        return replace(
            fitted, bias=fitted.bias - ngram_bias.numpy(), ngrams=self._ngrams, ngram_weight=ngram_weight
        )

    def scores(self, item: MrcInput, output: NDArray[np.floating]) -> Floats:
        """Only the head that `fit` gives has scores."""
        raise NotImplementedError("a ridge head scores after fit()")

    def gold_losses(self, inputs: Sequence[MrcInput], outputs: Sequence[NDArray[np.floating]]) -> list[float]:
        """Only the head that `fit` gives has scores."""
        raise NotImplementedError("a ridge head scores after fit()")

    def _kernel(self, features: NDArray[np.floating]) -> Tensor:
        """Centred kernels [P, N, N] of features [P, N, F], with the n-grams' share if there are any."""
        rows = torch.from_numpy(np.asarray(features, dtype=np.float64))
        kernel = centred(rows @ rows.transpose(-1, -2))
        if self._known is None:
            return kernel
        return STATES_SHARE * kernel + (1 - STATES_SHARE) * self._known


@dataclass(frozen=True, kw_only=True)
class FittedRidge:
    """Linear scores of pooled states (and token n-grams); see `Head`, of which it has the scoring half."""

    settings: RidgeSettings
    state_weight: Floats  # [F, C]
    bias: Floats  # [C]
    ngrams: NgramFeatures | None = None
    ngram_weight: Floats | None = None  # [G, C], of pairs [2 G, C]

    def state(self) -> dict[str, NDArray[Any]]:
        """Its tensors, for a file; n-grams [G, 3] int64, -1 behind the shorter ones."""
        found: dict[str, NDArray[Any]] = {
            "ridge_state_weight": np.ascontiguousarray(self.state_weight),
            "ridge_bias": np.ascontiguousarray(self.bias),
        }
        if self.ngrams is not None and self.ngram_weight is not None:
            rows = np.full((len(self.ngrams.vocabulary), LONGEST), -1, np.int64)
            for row, ngram in zip(rows, self.ngrams.vocabulary, strict=True):
                row[: len(ngram)] = ngram
            found |= {
                "ridge_ngrams": rows,
                "ridge_idf": self.ngrams.idf,
                "ridge_ngram_weight": np.ascontiguousarray(self.ngram_weight),
            }
        return found

    @classmethod
    def from_state(cls, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> FittedRidge:
        """Read back what `state` wrote; KeyError, TypeError or ValueError for what is not that."""
        chosen = RidgeSettings.of(settings)
        weight, bias = tensors["ridge_state_weight"], tensors["ridge_bias"]
        if weight.ndim != 2 or bias.shape != weight.shape[1:]:
            raise ValueError(f"weights of shape {weight.shape} and a bias of shape {bias.shape}")
        if not all(np.isfinite(x).all() for x in (weight, bias)):
            raise ValueError("weights that are not finite")
        ngrams = None
        if chosen.ngrams:
            rows = tensors["ridge_ngrams"]
            vocabulary = [tuple(int(i) for i in row if i >= 0) for row in rows]
            ngrams = NgramFeatures(vocabulary, tensors["ridge_idf"])
        return cls(
            settings=chosen,
            state_weight=weight,
            bias=bias,
            ngrams=ngrams,
            ngram_weight=tensors["ridge_ngram_weight"] if ngrams is not None else None,
        )

    @property
    def layer(self) -> int:
        """See `Head.layer`."""
        return self.settings.layer

    def fit(self, outputs: Callable[[], NDArray[np.floating]]) -> FittedRidge:
        """Return itself."""
        return self

    def training_outputs(self, states: States) -> Tensor:
        """Return what `scoring_outputs` does."""
        return pooled(states)

    def losses(self, outputs: NDArray[np.floating]) -> Floats:
        """A head that was fitted has no training set to leave examples out of."""
        raise NotImplementedError("a fitted ridge head only scores")

    def to(self, device: torch.device) -> FittedRidge:
        """See `Head.to`: the few weights stay on the host."""
        return self

    def targets(self, inputs: Sequence[MrcInput]) -> NDArray[np.int64]:
        """Return the first and last tokens of each input's fields [N, 2 S]."""
        return np.stack([item.segments for item in inputs]).reshape(len(inputs), -1)

    def scoring_outputs(self, states: States) -> Tensor:
        """Return pooled features [p, n, F], float32."""
        return pooled(states)

    def scores(self, item: MrcInput, output: NDArray[np.floating]) -> Floats:
        """Return log-scores of the labels [C], up to a constant."""
        found = np.asarray(output, dtype=np.float64) @ self.state_weight + self.bias
        if self.ngrams is not None and self.ngram_weight is not None:
            found = found + self.ngrams(fields_of(item)) @ self.ngram_weight
        return np.asarray(self.settings.temperature * found)

    def gold_losses(self, inputs: Sequence[MrcInput], outputs: Sequence[NDArray[np.floating]]) -> list[float]:
        """Return the cross-entropies of the gold labels."""
        rows = [(item, self.scores(item, output)) for item, output in zip(inputs, outputs, strict=True)]
        return [float(np.logaddexp.reduce(row) - row[item.label]) for item, row in rows]


def pooled(states: States) -> Tensor:
    """Features [p, n, F] of each example: the mean state of its field, or of two fields what compares them.

    Two fields u, v give u, v, |u - v| and u * v (Conneau et al. 2017), more fields their means in a row. The
    heads' targets are the fields' first and last tokens.
    """
    grid = states.each(lambda x: x.float(), 0.0)  # [p, n, T, H]
    spans = states.targets.view(len(states.targets), -1, 2)
    at = torch.arange(grid.shape[2], device=grid.device)
    inside = ((at >= spans[..., :1]) & (at <= spans[..., 1:])).float()  # [n, S, T]
    shares = inside / inside.sum(-1, keepdim=True).clamp_min(1.0)
    means = torch.einsum("nst,pnth->pnsh", shares, grid)
    if means.shape[2] != 2:
        return means.flatten(2)
    u, v = means.unbind(2)
    return torch.cat([u, v, (u - v).abs(), u * v], -1)


def fields_of(item: MrcInput) -> list[list[int]]:
    """Token ids of each text field of an input."""
    return [item.input_ids[first : last + 1].tolist() for first, last in item.segments]


def _primal(features: Tensor, weights: Tensor, share: float) -> tuple[Floats, Tensor]:
    """Weights [F, C] and what they give the features' mean [C]: the dual solution, written out."""
    middle = features.mean(0)
    rows = features - middle
    scale = float((rows * rows).sum(1).mean())
    primal = rows.T @ weights * (share / scale if scale else 0.0)
    return primal.numpy(), middle @ primal

"""A closed-form head for classification over any encoder: kernel ridge regression on pooled states.

The hidden states of one layer are averaged over each text field; ridge regression maps them to the labels,
fitted to the few-shot examples in closed form, no gradients. What the search lowers is the leave-one-out
cross-entropy of its scores (`mp2.heads.leave_one_out`): a candidate prompt is good if it makes each example
predictable from the others. At the untuned prompt this is a linear probe. Token n-grams may stand beside the
states, as a second kernel: they do not depend on the prompt, and know words that the encoder averages away.

How much weight the states have beside the n-grams, and the ridge penalty, are not chosen but averaged over: a
head is several regressions on the states of one layer, each with the weight that its leave-one-out likelihood
gives it. Their sum is one linear map, so that answering costs what one regression costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mp2.heads.head import States
from mp2.heads.leave_one_out import centred, cross_entropy, dual, each_penalty, model_weights
from mp2.tasks.calibration import fitted_temperature

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

Floats = NDArray[np.float64]
SHARES = (0.0, 0.15, 0.5)
"""The shares of the states in the kernel that are averaged over; dev/log.md has what other shares gave."""
LEAST_WEIGHT = 0.01  # regressions of less are left out
LONGEST = 3  # tokens of an n-gram: 1, 2 and 3
Ngram = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RidgePart:
    """One regression of several."""

    share: float  # of the states in the kernel; the n-grams have the rest
    penalty: float
    weight: float  # of its scores in the sum


@dataclass(frozen=True, kw_only=True)
class RidgeSettings:
    """What is chosen once, at the untuned prompt, by the leave-one-out loss."""

    layer: int  # whose states are pooled: 0 the embeddings, L the last layer's output
    ngrams: bool  # whether token n-grams stand beside the states
    temperature: float = 1.0  # a factor of the sum of scores
    parts: tuple[RidgePart, ...] = ()  # for losses; a fitted head needs none

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> RidgeSettings:
        """What a fitted head needs of the settings in its metadata; KeyError where one is missing."""
        return cls(**{name: stored[name] for name in ("layer", "ngrams", "temperature")})


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
        _, _, scores = self._regressions(outputs)
        losses: Floats = cross_entropy(scores, self._labels, self.settings.temperature).numpy()
        return losses

    def example_losses(self, outputs: NDArray[np.floating]) -> Floats:
        """Leave-one-out cross-entropies [N] of features [N, F]; `losses` is their mean."""
        _, _, scores = self._regressions(outputs[None])
        log_probs = torch.log_softmax(self.settings.temperature * scores[0], -1)
        found: Floats = -log_probs[torch.arange(len(self._labels)), self._labels].numpy()
        return found

    def with_best_settings(self, outputs: NDArray[np.floating]) -> tuple[float, RidgeHead]:
        """(What it is worth as a loss, head): the regressions that suit features [N, F], and their weights.

        Each has the temperature that suits it best. See `model_weights`. The weights are rounded, so that a
        run that goes on elsewhere, where sums differ in their last bits, has the same head.
        """
        kernel = self._states_kernel(outputs[None])
        tried = [
            (share, *found)
            for share in (SHARES if self._known is not None else (1.0,))
            for found in each_penalty(self._kernel(kernel, share)[0], self._labels, self._n_labels)
        ]
        weights, loss = model_weights([found[1] for found in tried], len(self._train))
        kept = weights >= min(LEAST_WEIGHT, weights.max())
        weights = np.where(kept, weights, 0.0) / weights[kept].sum()
        parts = tuple(
            RidgePart(share=share, penalty=penalty, weight=round(float(weight) * temperature, 3))
            for weight, (share, _, penalty, temperature) in zip(weights, tried, strict=True)
            if weight
        )
        settings = replace(self.settings, temperature=1.0, parts=parts)
        return loss, RidgeHead(self._train, self._n_labels, settings)

    def fit(self, outputs: Callable[[], NDArray[np.floating]]) -> FittedRidge:
        """Return the sum of the regressions that were fitted to all training examples under one prompt.

        Its temperature is the one that suits the leave-one-out scores under this prompt.
        """
        features = torch.from_numpy(np.asarray(outputs(), dtype=np.float64))
        by_states, by_ngrams, left_out = self._regressions(features.numpy()[None])
        temperature = 1 / fitted_temperature(list(left_out[0].numpy()), self._labels.tolist())
        mean_target = self._targets.mean(0) * sum(part.weight for part in self.settings.parts)
        state_weight, state_bias = _primal(features, by_states[0])
        fitted = FittedRidge(
            settings=replace(self.settings, temperature=temperature),
            state_weight=state_weight,
            bias=(mean_target - state_bias).numpy(),
        )
        if self._ngrams is None:
            return fitted
        rows = torch.from_numpy(np.stack([self._ngrams(fields_of(item)) for item in self._train]))
        ngram_weight, ngram_bias = _primal(rows, by_ngrams[0])
        return replace(
            fitted, bias=fitted.bias - ngram_bias.numpy(), ngrams=self._ngrams, ngram_weight=ngram_weight
        )

    def scores(self, item: MrcInput, output: NDArray[np.floating]) -> Floats:
        """Only the head that `fit` gives has scores."""
        raise NotImplementedError("a ridge head scores after fit()")

    def gold_losses(self, inputs: Sequence[MrcInput], outputs: Sequence[NDArray[np.floating]]) -> list[float]:
        """Only the head that `fit` gives has scores."""
        raise NotImplementedError("a ridge head scores after fit()")

    def _regressions(self, features: NDArray[np.floating]) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the parts, of features [P, N, F].

        Dual weights [P, N, C] of the states' kernel and of the n-grams', and leave-one-out scores [P, N, C].
        Where features are not finite, neither are the results, whatever share the states have.
        """
        kernel = self._states_kernel(features)
        bad = 0.0 * kernel.sum(dim=(-2, -1), keepdim=True)
        by_states, by_ngrams, scores = bad, bad, bad
        for part in self.settings.parts:
            weights, left_out = dual(self._kernel(kernel, part.share), self._targets, part.penalty)
            by_states = by_states + part.weight * part.share * weights
            by_ngrams = by_ngrams + part.weight * (1 - part.share) * weights
            scores = scores + part.weight * left_out
        return by_states, by_ngrams, scores

    def _states_kernel(self, features: NDArray[np.floating]) -> Tensor:
        """Centred kernels [P, N, N] of features [P, N, F]."""
        rows = torch.from_numpy(np.asarray(features, dtype=np.float64))
        return centred(rows @ rows.transpose(-1, -2))

    def _kernel(self, of_states: Tensor, share: float) -> Tensor:
        """Kernels [P, N, N] in which the states have ``share`` and n-grams the rest; [1, N, N] for none."""
        if self._known is None:
            return of_states
        if not share:
            return self._known[None]
        return share * of_states + (1 - share) * self._known


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


def _primal(features: Tensor, weights: Tensor) -> tuple[Floats, Tensor]:
    """Weights [F, C] and what they give the features' mean [C]: the dual solution, written out."""
    middle = features.mean(0)
    rows = features - middle
    scale = float((rows * rows).sum(1).mean())
    primal = rows.T @ weights * (1 / scale if scale else 0.0)
    return primal.numpy(), middle @ primal


class NgramFeatures:
    """TF-IDF of token n-grams: what a bag of words knows of a text, from the ids that the encoder reads.

    Weights as in Salton and Buckley (1988), smoothed as scikit-learn does: idf = ln((1 + N) / (1 + df)) + 1
    over the N training examples, rows of length 1. With a character vocabulary these are character n-grams.
    """

    def __init__(self, vocabulary: Sequence[Ngram], idf: Floats) -> None:
        """Take n-grams in a fixed order and their ``idf`` [G]."""
        self.vocabulary, self.idf = tuple(vocabulary), np.asarray(idf, dtype=np.float64)
        self._index = {ngram: i for i, ngram in enumerate(self.vocabulary)}

    @classmethod
    def of(cls, texts: Sequence[Sequence[Sequence[int]]]) -> NgramFeatures:
        """Learn from training ``texts``, each a list of fields, each field a list of token ids."""
        n_texts_with: Counter[Ngram] = Counter()
        for fields in texts:
            n_texts_with.update({ngram for field in fields for ngram in _ngrams(field)})
        vocabulary = sorted(n_texts_with)
        df = np.array([n_texts_with[ngram] for ngram in vocabulary], dtype=np.float64)
        return cls(vocabulary, np.log((1 + len(texts)) / (1 + df)) + 1)

    def __call__(self, fields: Sequence[Sequence[int]]) -> Floats:
        """Features of one text: [G] of its only field; of two fields |a - b| and a * b, [2 G]."""
        rows = [self._row(field) for field in fields]
        if len(rows) == 2:
            a, b = rows
            return np.concatenate([np.abs(a - b), a * b])
        return np.asarray(sum(rows[1:], rows[0]))

    def _row(self, field: Sequence[int]) -> Floats:
        row = np.zeros(len(self.idf))
        for ngram, count in Counter(_ngrams(field)).items():
            i = self._index.get(ngram)
            if i is not None:
                row[i] = count * self.idf[i]
        length = float(np.sqrt(row @ row))
        return row / length if length else row


def _ngrams(field: Sequence[int]) -> list[Ngram]:
    ids = [int(i) for i in field]
    return [tuple(ids[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(ids) - n + 1)]

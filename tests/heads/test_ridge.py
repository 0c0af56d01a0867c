from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from mp2.heads.leave_one_out import PENALTIES, TEMPERATURES
from mp2.heads.ridge import LEAST_WEIGHT, SHARES, NgramFeatures, RidgeHead, RidgePart, RidgeSettings, pooled
from mp2.tasks import MrcInput

PENALTY, WEIGHT = 0.3, 4.0
SETTINGS = RidgeSettings(layer=2, ngrams=False, parts=(RidgePart(share=1.0, penalty=PENALTY, weight=WEIGHT),))


class GivenStates:
    """Hidden states [p, n, T, H] and the heads' targets."""

    def __init__(self, hidden: torch.Tensor, targets: np.ndarray) -> None:
        self.hidden, self.targets = hidden, torch.from_numpy(targets)

    def each(self, change: object, empty: float) -> torch.Tensor:
        return change(self.hidden)  # type: ignore[operator,no-any-return]


def item(example: int, ids: list[int], segments: list[tuple[int, int]], label: int) -> MrcInput:
    return MrcInput(
        example=example,
        input_ids=np.array(ids),
        start=0,
        end=0,
        option_spans=np.empty((0, 2), np.int64),
        label=label,
        segments=np.array(segments),
    )


def train(n: int = 9, fields: int = 1) -> list[MrcInput]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        ids, segments = [2], []
        for _ in range(fields):
            length = int(rng.integers(2, 5))
            segments.append((len(ids), len(ids) + length - 1))
            ids += [*rng.integers(5, 12, length).tolist(), 3]
        made.append(item(i, ids, segments, i % 3))
    return made


def test_pooled_states_are_the_fields_means() -> None:
    items = [item(0, [2, 7, 8, 9, 3], [(1, 3)], 0), item(1, [2, 7, 3, 0, 0], [(1, 1)], 1)]
    hidden = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    found = pooled(GivenStates(hidden, np.array([[1, 3], [1, 1]])))
    expected = torch.stack([hidden[:, 0, 1:4].mean(1), hidden[:, 1, 1]], 1)
    torch.testing.assert_close(found, expected)
    assert len(items) == found.shape[1]


def test_two_fields_are_compared() -> None:
    hidden = torch.randn(1, 1, 7, 4, generator=torch.Generator().manual_seed(0))
    found = pooled(GivenStates(hidden, np.array([[1, 2, 4, 5]])))[0, 0]
    u, v = hidden[0, 0, 1:3].mean(0), hidden[0, 0, 4:6].mean(0)
    torch.testing.assert_close(found, torch.cat([u, v, (u - v).abs(), u * v]))


def test_a_field_without_tokens_counts_as_nothing() -> None:
    found = pooled(GivenStates(torch.ones(1, 1, 3, 4), np.array([[1, 0]])))
    assert found.abs().max() == 0


@pytest.mark.parametrize("ngrams", [False, True])
@pytest.mark.parametrize("fields", [1, 2])
def test_fitted_scores_equal_the_sum_of_ridge_regressions_on_the_same_features(
    ngrams: bool, fields: int
) -> None:
    items = train(fields=fields)
    parts = SETTINGS.parts
    if ngrams:
        parts = tuple(
            RidgePart(share=s, penalty=p, weight=w) for s, p, w in ((0.0, 1, 2), (0.15, 0.1, 3), (0.5, 2, 1))
        )
    head = RidgeHead(items, 3, replace(SETTINGS, ngrams=ngrams, parts=parts))
    rng = np.random.default_rng(1)
    features, new = rng.standard_normal((9, 5)) + 2, rng.standard_normal((9, 5)) + 2
    fitted = head.fit(lambda: features)

    def scaled(x: np.ndarray, y: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
        middle = x.mean(0)
        size = np.sqrt(((x - middle) ** 2).sum(1).mean())
        return np.sqrt(share) * (x - middle) / size, np.sqrt(share) * (y - middle) / size

    others = train(9, fields)[::-1]  # other texts stand beside the new states
    learned = NgramFeatures.of([[i.input_ids[a : b + 1].tolist() for a, b in i.segments] for i in items])
    texts = [
        np.stack([learned([i.input_ids[x : y + 1].tolist() for x, y in i.segments]) for i in some])
        for some in (items, others)
    ]
    targets = np.eye(3)[[i.label for i in items]]
    expected = np.zeros((9, 3))
    for part in parts:
        known, asked = scaled(features, new, part.share)
        if ngrams:
            a, b = scaled(*texts, 1 - part.share)
            known, asked = np.hstack([known, a]), np.hstack([asked, b])
        model = Ridge(alpha=part.penalty, solver="svd").fit(known, targets)
        expected += part.weight * model.predict(asked)
    got = np.stack([fitted.scores(i, x) for i, x in zip(others, new, strict=True)])
    assert_allclose(got, fitted.settings.temperature * expected, rtol=0, atol=1e-8)


def test_parts_weigh_what_their_leave_one_out_likelihood_says() -> None:
    """Penalties, shares and weights again, by N fits each."""
    items = train(12)
    rng = np.random.default_rng(3)
    labels = np.array([i.label for i in items])
    features = rng.standard_normal((12, 5)) + 1.5 * np.eye(5)[labels]
    loss, head = RidgeHead(items, 3, replace(SETTINGS, ngrams=True, parts=())).with_best_settings(features)
    learned = NgramFeatures.of([[i.input_ids[a : b + 1].tolist() for a, b in i.segments] for i in items])
    texts = np.stack([learned([i.input_ids[a : b + 1].tolist() for a, b in i.segments]) for i in items])

    def kernel(x: np.ndarray) -> np.ndarray:
        x = x - x.mean(0)
        return x @ x.T / (x * x).sum(1).mean()

    tried = {}
    for share in SHARES:
        gram = share * kernel(features) + (1 - share) * kernel(texts)
        values, vectors = np.linalg.eigh(gram)
        rows = vectors * np.sqrt(np.maximum(values, 0))
        for penalty in PENALTIES:
            scores = np.empty((12, 3))
            for i in range(12):
                rest = np.arange(12) != i
                model = Ridge(alpha=penalty, solver="svd").fit(rows[rest], np.eye(3)[labels[rest]])
                scores[i] = model.predict(rows[i : i + 1])[0]
            losses = [
                (np.logaddexp.reduce(t * scores, 1) - t * scores[np.arange(12), labels]).mean()
                for t in TEMPERATURES
            ]
            tried[share, penalty] = min(losses), TEMPERATURES[int(np.argmin(losses))]
    likelihoods = {key: np.exp(-12 * found) for key, (found, _) in tried.items()}
    assert abs(loss + np.log(np.mean(list(likelihoods.values()))) / 12) < 1e-8
    kept = {key: x for key, x in likelihoods.items() if x >= LEAST_WEIGHT * sum(likelihoods.values())}
    assert 1 < len(kept) < len(tried)
    assert {(part.share, part.penalty) for part in head.settings.parts} == set(kept)
    for part in head.settings.parts:
        _, temperature = tried[part.share, part.penalty]
        expected = temperature * kept[part.share, part.penalty] / sum(kept.values())
        assert abs(part.weight - expected) < 6e-4


def test_a_prompt_that_is_not_finite_has_no_finite_loss_even_where_n_grams_have_all_the_weight() -> None:
    parts = (RidgePart(share=0.0, penalty=1.0, weight=4.0),)
    head = RidgeHead(train(), 3, replace(SETTINGS, ngrams=True, parts=parts))
    features = np.random.default_rng(2).standard_normal((2, 9, 5))
    features[1, 3, 2] = np.nan
    first, second = head.losses(features)
    assert np.isfinite(first)
    assert np.isnan(second)


def test_losses_are_leave_one_out_cross_entropies_of_separate_fits() -> None:
    items = train()
    features = np.random.default_rng(2).standard_normal((3, 9, 5))
    head = RidgeHead(items, 3, SETTINGS)
    labels = np.array([i.label for i in items])
    for features_of_one, loss in zip(features, head.losses(features), strict=True):
        x = features_of_one - features_of_one.mean(0)
        x = x / np.sqrt((x * x).sum(1).mean())
        total = 0.0
        for i in range(9):
            rest = np.arange(9) != i
            model = Ridge(alpha=PENALTY, solver="svd").fit(x[rest], np.eye(3)[labels[rest]])
            scores = WEIGHT * model.predict(x[i : i + 1])[0]
            total += np.logaddexp.reduce(scores) - scores[labels[i]]
        assert abs(loss - total / 9) < 1e-9


def test_ngram_features_are_scikit_learns_tf_idf() -> None:
    texts = ["abca", "bcd", "aab", "dd"]
    ids = [[[ord(c) for c in text]] for text in texts]
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), lowercase=False)
    expected = vectorizer.fit_transform(texts).toarray()
    learned = NgramFeatures.of(ids)
    order = [learned.vocabulary.index(tuple(map(ord, name))) for name in vectorizer.get_feature_names_out()]
    assert_allclose(np.stack([learned(fields) for fields in ids])[:, order], expected, atol=1e-12)
    assert learned([[1, 2, 3]]).max() == 0

"""The two models of the baselines: TF-IDF of character n-grams, and logistic regression (scikit-learn)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

NGRAMS = (1, 3)
STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # C of scikit-learn, the inverse of the regularisation
DEFAULT_STRENGTH = 1.0  # scikit-learn's own, where there are too few examples to choose by
MAX_FOLDS = 4
MAX_STEPS = 10_000  # of the solver; it stops when it has converged


class TfIdf:
    """TF-IDF of character 1- to 3-grams, known from the training texts.

    Its features are exact and few: a linear model with an L2 penalty sees a text only through its inner
    products with the training texts, so n of these need at most n features, whatever the number of n-grams.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer = TfidfVectorizer(analyzer="char", ngram_range=NGRAMS)
        self._rows = self._vectorizer.fit_transform([text or " " for text in texts])
        values, vectors = np.linalg.eigh((self._rows @ self._rows.T).toarray())
        kept = values > 1e-9 * values[-1]
        self._to_features = vectors[:, kept] / np.sqrt(values[kept])
        self.train: Floats = vectors[:, kept] * np.sqrt(values[kept])
        """Features [n, r] of the training texts."""

    def __call__(self, texts: Sequence[str]) -> Floats:
        """Return the features [n, r] of texts."""
        rows = self._vectorizer.transform(texts)
        features: Floats = (rows @ self._rows.T) @ self._to_features
        return features


class Similarity:
    """Cosines of texts by TF-IDF of character 1- to 3-grams; those unknown in training weigh the most."""

    def __init__(self, texts: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

        self._counts = HashingVectorizer(
            analyzer="char", ngram_range=NGRAMS, norm=None, alternate_sign=False, n_features=2**20
        )
        self._weights = TfidfTransformer().fit(self._counts.transform(texts))

    def __call__(self, texts: Sequence[str], others: Sequence[Sequence[str]]) -> list[Floats]:
        """Return for each text its cosine with each of its ``others``."""
        rows = self._weights.transform(self._counts.transform(texts))
        flat = self._weights.transform(self._counts.transform([o for several in others for o in several]))
        of_text = np.repeat(np.arange(len(texts)), [len(several) for several in others])
        cosines = np.asarray(flat.multiply(rows[of_text]).sum(1))[:, 0]
        return np.split(cosines, np.flatnonzero(np.diff(of_text)) + 1)


class Logistic:
    """A fitted logistic regression; where all examples have one label, that label."""

    def __init__(self, features: Floats, labels: Sequence[str], strength: float) -> None:
        from sklearn.linear_model import LogisticRegression

        self.strength = strength
        self._only = labels[0] if len(set(labels)) == 1 else None
        if self._only is None:
            self._model = LogisticRegression(C=strength, max_iter=MAX_STEPS).fit(features, list(labels))

    def labels(self, features: Floats) -> list[str]:
        """Return the label of each row."""
        if self._only is not None:
            return [self._only] * len(features)
        return [str(label) for label in self._model.predict(features)]

    def log_odds(self, features: Floats, label: str) -> Floats:
        """Return the score of one of two labels for each row."""
        if self._only is not None:
            return np.zeros(len(features))
        sign = 1.0 if self._model.classes_[1] == label else -1.0
        scores: Floats = sign * self._model.decision_function(features)
        return scores


def fitted_logistic(features: Floats, labels: Sequence[str]) -> Logistic:
    """Return a logistic regression whose strength is chosen by cross-validation on the same examples.

    The folds are stratified, as many as the rarest label has examples, at most 4; the smallest mean log loss
    wins, ties go to the stronger regularisation.
    """
    n_folds = min(MAX_FOLDS, *Counter(labels).values())
    if n_folds < 2 or len(set(labels)) < 2:
        return Logistic(features, labels, DEFAULT_STRENGTH)
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    folds = StratifiedKFold(n_folds)
    losses = [
        -cross_val_score(
            LogisticRegression(C=c, max_iter=MAX_STEPS),
            features,
            list(labels),
            cv=folds,
            scoring="neg_log_loss",
        ).mean()
        for c in STRENGTHS
    ]
    return Logistic(features, labels, STRENGTHS[int(np.argmin(losses))])


def standardised(features: Floats) -> tuple[Callable[[Floats], Floats], Floats]:
    """Return a map to zero mean and unit deviation of ``features`` [n, D], and ``features`` after it."""
    mean, deviation = features.mean(0), features.std(0)
    deviation = np.where(deviation > 1e-12 + 1e-6 * np.abs(mean), deviation, 1.0)  # a constant stays zero

    def scale(rows: Floats) -> Floats:
        scaled: Floats = (rows.astype(np.float64) - mean) / deviation
        return scaled

    return scale, scale(features)

"""TF-IDF features of token n-grams: what a bag of words knows of a text, from the ids that the encoder reads.

Weights as in Salton and Buckley (1988), smoothed as scikit-learn does: idf = ln((1 + N) / (1 + df)) + 1 over
the N training examples, rows of length 1. With a character vocabulary these are character n-grams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LONGEST = 3  # tokens of an n-gram: 1, 2 and 3
Ngram = tuple[int, ...]


class NgramFeatures:
    """The n-grams of some training texts, and their weights."""

    def __init__(self, vocabulary: Sequence[Ngram], idf: NDArray[np.float64]) -> None:
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

    def __call__(self, fields: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Features of one text: [G] of its only field; of two fields |a - b| and a * b, [2 G]."""
        rows = [self._row(field) for field in fields]
        if len(rows) == 2:
            a, b = rows
            return np.concatenate([np.abs(a - b), a * b])
        return np.asarray(sum(rows[1:], rows[0]))

    def _row(self, field: Sequence[int]) -> NDArray[np.float64]:
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

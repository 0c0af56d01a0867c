"""Documents, sentences and words of plain text, for tasks that are cut out of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from mp2.errors import UsageError
from mp2.training.corpus import paragraphs

MIN_DOCUMENTS, MAX_SHARE, MIN_NPMI = 20, 0.01, 0.35
_SENTENCE = re.compile(r"[^。！？；!?;\n]+[。！？；!?;]?")
_HAN = re.compile(r"[\u4e00-\u9fff]")
_QUOTES = str.maketrans("", "", '“”「」『』"')


@dataclass(frozen=True)
class Words:
    """The corpus's words: the documents that each stands in, and how many documents there are."""

    documents: dict[str, int]
    n_documents: int

    def salient(self, text: str, least: int = 1) -> list[str]:
        """The words of a text that are most typical of it (tf-idf), best first; at most five."""
        counts = Counter(text[i : i + 2] for i in range(len(text) - 1))
        scored = [
            (n * math.log(self.n_documents / self.documents[word]), word)
            for word, n in counts.items()
            if n >= least and word in self.documents
        ]
        return [word for _, word in sorted(scored, reverse=True)[:5]]


def documents(files: Iterable[Path]) -> Iterator[list[str]]:
    """The documents of a corpus as lists of sentences, quotation marks removed."""
    lines: list[str] = []
    for file in files:
        for line in [*paragraphs(file), ""]:
            if line:
                lines.append(line.translate(_QUOTES))
            elif lines:
                yield [s.strip() for part in lines for s in _SENTENCE.findall(part) if s.strip()]
                lines = []


def find_words(texts: Sequence[Sequence[str]]) -> Words:
    """Character pairs that are words: NPMI above 0.35, in 20 documents or more, in under 1 % of them.

    Raises:
        UsageError: fewer than 50 are found; the corpus is too small.
    """
    characters: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    in_documents: Counter[str] = Counter()
    for sentences in texts:
        seen: set[str] = set()
        for sentence in sentences:
            characters.update(sentence)
            found = [a + b for a, b in pairwise(sentence)]
            pairs.update(found)
            seen.update(found)
        in_documents.update(seen)
    total = sum(characters.values())
    n_pairs = sum(pairs.values())
    kept = {}
    for pair, n in pairs.items():
        documents_with = in_documents[pair]
        if not MIN_DOCUMENTS <= documents_with <= max(MAX_SHARE * len(texts), MIN_DOCUMENTS):
            continue
        if len(_HAN.findall(pair)) < 2:
            continue
        p = n / n_pairs
        pmi = math.log(p * total * total / (characters[pair[0]] * characters[pair[1]]))
        if pmi / -math.log(p) > MIN_NPMI:
            kept[pair] = documents_with
    if len(kept) < 50:
        raise UsageError(
            f"{len(kept)} words found in {len(texts)} documents, expected at least 50; give a larger corpus"
        )
    return Words(kept, len(texts))


def longest_common(a: str, b: str, limit: int) -> str:
    """The longest run of at most ``limit`` characters that stands in both texts; the first one of several."""
    for n in range(min(limit, len(a), len(b)), 0, -1):
        runs = {b[i : i + n] for i in range(len(b) - n + 1)}
        for i in range(len(a) - n + 1):
            if a[i : i + n] in runs:
                return a[i : i + n]
    return ""

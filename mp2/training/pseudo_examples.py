"""The examples of the pseudo-tasks, cut out of documents."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mp2.training.corpus_words import Words, longest_common


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((a, b) for a, b in (pair.split("/") for pair in text.split()))


POLAR_WORDS = _pairs(
    "满意/失望 喜欢/讨厌 推荐/后悔 不错/糟糕 好看/难看 好吃/难吃 开心/难过 便宜/太贵 "
    "干净/肮脏 漂亮/丑陋 舒服/难受 精彩/无聊 热情/冷漠 方便/麻烦 结实/破烂 划算/坑人 "
    "完美/垃圾 幸福/痛苦 优秀/恶劣 清晰/模糊 很好/很差 很棒/太差 太好/太烂 好/坏"
)
YES_NO = _pairs("是/否 相关/无关 相同/不同 对/错 一致/矛盾 可以/不可以")
MAX_TEXT = 64  # characters of a text, so that it fits 128 tokens with its options
_MIN_TEXT = 12
_NEGATION = re.compile("[不没无别未]")

Record = dict[str, Any]


def piece(sentences: Sequence[str], rng: np.random.Generator, limit: int = MAX_TEXT) -> tuple[int, int, str]:
    """Neighbouring sentences, ``limit`` characters at most: index of the first, after the last, the text."""
    first = int(rng.integers(len(sentences)))
    last, text = first, ""
    while last < len(sentences) and len(text) + len(sentences[last]) <= limit:
        text += sentences[last]
        last += 1
    return first, max(last, first + 1), text if text else sentences[first][:limit]


class Maker:
    """Makes examples of every pseudo-task from documents: foreign sentences are drawn from ``texts`` alone.

    An equal generator makes the same examples.
    """

    def __init__(self, texts: Sequence[Sequence[str]], words: Words, rng: np.random.Generator) -> None:
        self.texts, self.words, self.rng = texts, words, rng
        weights = np.asarray([math.sqrt(n) for n in words.documents.values()])
        self._names = list(words.documents)
        self._cumulative = np.cumsum(weights / weights.sum())
        self._sense = {word: side for pair in POLAR_WORDS for side, word in enumerate(pair)}
        found = [word for word in self._sense if len(word) > 1]  # one character stands in too many words
        self._polar = re.compile("|".join(found))
        self._n_polar = [0, 0]

    def examples(self, sentences: Sequence[str]) -> Iterator[tuple[str, Record]]:
        """(task, JSON record) of every example that a document gives."""
        for make in (self.word, self.polar, self.follows, self.pair, self.edited, self.recurring):
            for task, record in make(sentences):
                options = record.get("options", [])
                if len(set(options)) == len(options):
                    yield task, record

    def word(self, sentences: Sequence[str]) -> Iterator[tuple[str, Record]]:
        """Examples of the four word tasks, all on one text and one list of options."""
        _, _, text = piece(sentences, self.rng)
        typical = self.words.salient(text)
        if len(text) < _MIN_TEXT or len(typical) < 2:
            return
        missing, present = (typical[i] for i in self.rng.permutation(len(typical))[:2])
        context = text.replace(missing, "")
        if present not in context:
            return
        others = [w for w in self._random_words(int(self.rng.integers(1, 9))) if w not in text]
        options = list(dict.fromkeys([missing, present, *others]))
        if len(options) < 3:
            return
        options = [options[i] for i in self.rng.permutation(len(options))]
        commonest = max(options, key=lambda w: (self.words.documents[w], w))
        following = options[(options.index(missing) + 1) % len(options)]
        answers = {"missing": missing, "present": present, "next": following, "common": commonest}
        for task, answer in answers.items():
            yield f"word_{task}", _choice(context, options, answer)

    def polar(self, sentences: Sequence[str]) -> Iterator[tuple[str, Record]]:
        """Examples of the two polar tasks: the options are of the deleted word's pair, or of another one."""
        _, _, text = piece(sentences, self.rng)
        found = list(self._polar.finditer(text))
        senses = {self._sense[match[0]] for match in found}
        negated = any(_NEGATION.search(text, max(0, m.start() - 3), m.start()) for m in found)
        if len(text) < _MIN_TEXT or len(senses) != 1 or negated:
            return
        sense = senses.pop()
        if self._n_polar[sense] > self._n_polar[1 - sense] + 20:  # keep both senses equally frequent
            return
        self._n_polar[sense] += 1
        own = found[0][0]
        pairs = [pair for pair in POLAR_WORDS if own in pair]
        pair = pairs[0] if self.rng.random() < 0.5 else POLAR_WORDS[int(self.rng.integers(len(POLAR_WORDS)))]
        flip = int(self.rng.integers(2))
        options = list(pair[::-1] if flip else pair)
        context = self._polar.sub("", text)
        yield "polar", _choice(context, options, pair[sense])
        yield "polar_opposite", _choice(context, options, pair[1 - sense])

    def follows(self, sentences: Sequence[str]) -> Iterator[tuple[str, Record]]:
        """An example of each task of continuation; options are the first 12 characters of sentences."""
        _, last, text = piece(sentences, self.rng, 48)
        if len(text) < _MIN_TEXT or last >= len(sentences):
            return
        after = [s[:12] for s in sentences[last : last + 2] if len(s) >= 6]
        elsewhere = [s for _ in range(3) if len(s := self._random_sentence()[:12]) >= 6]
        if after and len(elsewhere) == 3:
            yield "follows", self._shuffled(text, [after[0], *elsewhere[: int(self.rng.integers(1, 4))]], 0)
        if len(after) == 2 and elsewhere:
            yield "follows_not", self._shuffled(text, [elsewhere[0], *after], 0)

    def pair(self, sentences: Sequence[str]) -> Iterator[tuple[str, Record]]:
        """Examples of same and same_opposite, half of them from one document."""
        _, last, text = piece(sentences, self.rng, 40)
        rest = [s for s in sentences[last : last + 4] if len(s) >= 8]
        if len(text) < _MIN_TEXT or not rest:
            return
        same = bool(self.rng.integers(2))
        other = rest[int(self.rng.integers(len(rest)))] if same else self._random_sentence()
        yield from self._yes_no(("same", "same_opposite"), text, other[:30], same)

    def edited(self, sentences: Sequence[str]) -> Iterator[tuple[str, Record]]:
        """An example of edited: the second text is the first with small edits, or one that shares words."""
        usable = [s for s in sentences if 10 <= len(s) <= 36]
        if len(usable) < 2:
            return
        first, second = (usable[i] for i in self.rng.permutation(len(usable))[:2])
        same = bool(self.rng.integers(2))
        if same:
            other = self._edit(first, 3)
        else:  # half of the other sentence is taken from the first, so that shared characters do not tell
            half = len(first) // 2
            other = (first[:half] + second[half:]) if self.rng.random() < 0.7 else second
            other = self._edit(other, 1)
        yield from self._yes_no(("edited",), first, other[:36], same)

    def recurring(self, sentences: Sequence[str]) -> Iterator[tuple[str, Record]]:
        """An example of recurring: a run of 2 to 8 characters that two sentences share."""
        usable = [s for s in sentences if 10 <= len(s) <= 48]
        if len(usable) < 2:
            return
        first, second = (usable[i] for i in self.rng.permutation(len(usable))[:2])
        phrase = longest_common(first, second, 8)
        holds_word = any(phrase[i : i + 2] in self.words.documents for i in range(len(phrase) - 1))
        if not holds_word or first.count(phrase) != 1 or phrase != phrase.strip("，。！？；、：,.!?;: "):
            return
        gap = second.replace(phrase, "什么")
        answers = [{"text": phrase, "start": first.index(phrase)}]
        yield "recurring", {"context": first, "question": gap, "answers": answers}

    def _yes_no(self, tasks: Sequence[str], a: str, b: str, same: bool) -> Iterator[tuple[str, Record]]:
        pair = YES_NO[int(self.rng.integers(len(YES_NO)))]
        options = list(pair[::-1] if self.rng.integers(2) else pair)
        for task, holds in zip(tasks, (same, not same), strict=False):
            yield task, {**_choice(a, options, pair[0 if holds else 1]), "question": b}

    def _shuffled(self, text: str, options: list[str], right: int) -> Record:
        answer = options[right]
        return _choice(text, [options[i] for i in self.rng.permutation(len(options))], answer)

    def _random_words(self, n: int) -> list[str]:
        found = np.searchsorted(self._cumulative, self.rng.random(n))
        return [self._names[min(int(i), len(self._names) - 1)] for i in found]

    def _random_sentence(self) -> str:
        sentences = self.texts[int(self.rng.integers(len(self.texts)))]
        return sentences[int(self.rng.integers(len(sentences)))]

    def _edit(self, text: str, most: int) -> str:
        characters = list(text)
        for _ in range(int(self.rng.integers(1, most + 1))):
            i = int(self.rng.integers(len(characters) - 1))
            kind = int(self.rng.integers(3))
            if kind == 0:
                del characters[i]
            elif kind == 1:
                characters.insert(i, characters[i])
            else:
                characters[i], characters[i + 1] = characters[i + 1], characters[i]
        return "".join(characters)


def _choice(context: str, options: list[str], answer: str) -> Record:
    return {"context": context, "question": "", "options": options, "label": options.index(answer)}

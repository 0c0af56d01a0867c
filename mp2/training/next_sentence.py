"""PPT's pre-training task: which of 2 to 16 sentences comes next? From plain text, without labels.

Gu et al. 2022, "PPT: Pre-trained Prompt Tuning for Few-shot Learning", its "Unified PPT": next-sentence
selection as multiple choice of 2 to 16 options. Of the wrong ones some are from the same document, not next
to the text (one of up to 6 options, two of up to 10, three of more: thu-coai/PPT,
``tools/preprocess_pretrain_data_nss_uni.py``), the others from other documents. Their code takes the sentence
before the text for the right option in half of the cases, where the paper says next; we keep to the paper.
Theirs are read by option letters through the language model's head; here they are written out like the
options of every task of ours and the span head points at one, so that it has no label words of its own and
its 16 options are a limit of training, not of form.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from mp2.backbone.tokenizer import Tokenizer
from mp2.errors import FormatError, UsageError
from mp2.files import own_folder, whole_file
from mp2.tasks import Example, MrcFormatter, MrcInput, TaskCard
from mp2.training.corpus import AGAIN, corpus_files, document_lines, file_digests, load_array
from mp2.training.mixture import MixtureTask

CARD = TaskCard(
    task="next_sentence",
    family="next sentence",
    type="multiple_choice",
    template="选择下文：“{text}”的下一句是？选项：{options}",
    metric="accuracy",
    shots_per_label=None,
    track="upstream",
    version=1,
    labels={},
    source=None,
    path=Path("next_sentence.toml"),
)
MOST_OPTIONS = 16  # Unified PPT's
LEAST_CHARACTERS = 8  # of a text or an option, where there is no room for more; fewer options before that
_SENTENCE = re.compile(r"[^。！？!?]+[。！？!?]*[”’」』]?")
_SHORTEST = 4  # characters of a sentence; shorter ones are headings and numbers
_SAME_DOCUMENT = {6: 1, 10: 2, MOST_OPTIONS: 3}  # up to so many options: wrong ones from the same document
_TRIES = 20  # an option, to find sentences that read differently
_HELD_OUT = 100  # every so many documents one, for dev


class Sentences:
    """The sentences of a corpus, document by document, on disk and memory-mapped.

    ``first`` [n_documents + 1]: the number of each document's first sentence. Documents of one sentence are
    left out.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        """Read the text files of ``folder`` once; what was cut is kept in ``cache`` by their content."""
        files = corpus_files(folder)
        content = [digest for _, _, digest in file_digests(files)]
        self.key = hashlib.sha256(repr([content, _SENTENCE.pattern, _SHORTEST]).encode()).hexdigest()[:16]
        base = cache / f"sentences-{self.key}"
        paths = [base.with_suffix(suffix) for suffix in (".txt", ".ends.npy", ".first.npy")]
        if not all(path.is_file() for path in paths):
            own_folder(cache)
            _write(files, paths)
        text, ends, first = paths
        self._path = text
        self._text = np.memmap(text, np.uint8, "r") if text.stat().st_size else np.empty(0, np.uint8)
        self._ends: NDArray[np.int64] = load_array(ends, np.int64, 1)
        self.first: NDArray[np.int64] = load_array(first, np.int64, 1)
        for path, places, end in ((ends, self._ends, len(self._text)), (first, self.first, len(self._ends))):
            last = places[-1] if len(places) else 0
            if last != end or (places < 0).any() or (np.diff(places) < 0).any():
                raise FormatError(f"its numbers do not rise to {end:,}; {AGAIN}", path=path)
        if len(self.first) < 3:
            raise UsageError(
                f"{folder} has {len(self.first) - 1} documents of two sentences or more, expected at least "
                "2: a blank line ends a document"
            )

    def __getitem__(self, number: int) -> str:
        start = int(self._ends[number - 1]) if number else 0
        try:
            return bytes(self._text[start : int(self._ends[number])]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(
                f"not the UTF-8 text that was cut: {error}; {AGAIN}", path=self._path
            ) from error


def _write(files: Sequence[Path], paths: Sequence[Path]) -> None:
    ends, first, at = [], [0], 0
    with whole_file(paths[0]) as partial, partial.open("wb") as text:
        for document in _documents(files):
            for sentence in document:
                at += text.write(sentence.encode())
                ends.append(at)
            first.append(len(ends))
    for path, values in zip(paths[1:], (ends, first), strict=True):
        with whole_file(path) as partial, partial.open("wb") as file:
            np.save(file, np.array(values, np.int64))


def _documents(files: Sequence[Path]) -> Iterator[list[str]]:
    document: list[str] = []
    for line in document_lines(files):
        if line:
            found = (match.strip() for match in _SENTENCE.findall(line))
            document += [sentence for sentence in found if len(sentence) >= _SHORTEST]
        else:
            if len(document) > 1:
                yield document
            document = []


class NextSentences(Sequence[MrcInput]):
    """One example for each sentence that another follows, made when asked for: a function of (seed, i)."""

    def __init__(
        self, sentences: Sentences, documents: NDArray[np.int64], formatter: MrcFormatter, seed: int
    ) -> None:
        """``documents``: the numbers of those that the sentences are taken from, ascending."""
        self.sentences, self._documents, self._formatter, self._seed = sentences, documents, formatter, seed
        pairs = sentences.first[documents + 1] - sentences.first[documents] - 1
        self._pairs = np.cumsum(pairs)  # of all documents up to each
        room = formatter.max_tokens - formatter.n_fixed_tokens - 1
        self._most = min(MOST_OPTIONS, room // (LEAST_CHARACTERS + 1) - 1)
        if self._most < 2:
            need = formatter.n_fixed_tokens + 1 + 3 * (LEAST_CHARACTERS + 1)
            raise UsageError(
                f"max_tokens is {formatter.max_tokens}, expected at least {need}: a sentence and two options"
            )
        self._room = room

    def __len__(self) -> int:
        return int(self._pairs[-1])

    @overload
    def __getitem__(self, index: int) -> MrcInput: ...
    @overload
    def __getitem__(self, index: slice) -> list[MrcInput]: ...
    def __getitem__(self, index: int | slice) -> MrcInput | list[MrcInput]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._formatter.training_input(self.example(int(index)), int(index))

    def example(self, index: int) -> Example:
        """Example ``index``: a sentence, options in random order, the number of the one that follows it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.default_rng([self._seed, 6, index])
        which = int(np.searchsorted(self._pairs, index, side="right"))
        before = int(self._pairs[which - 1]) if which else 0
        first = int(self.sentences.first[self._documents[which]])
        last = int(self.sentences.first[self._documents[which] + 1])
        at = first + index - before
        n_options = int(rng.integers(2, self._most + 1))
        cut = self._room // (n_options + 1) - 1  # characters of each piece; a separator or closing after it
        text, right = self.sentences[at][-cut:], self.sentences[at + 1][:cut]
        options = [right]

        def take(number: int) -> None:
            option = self.sentences[number][:cut]
            if option not in (text, *options):
                options.append(option)

        n_here = next(n for most, n in _SAME_DOCUMENT.items() if n_options <= most)
        here = np.arange(first, last)
        for number in rng.permutation(here[abs(here - at) > 1]):
            if len(options) > n_here:
                break
            take(int(number))
        for _ in range(_TRIES * n_options):
            if len(options) == n_options:
                break
            take(self._elsewhere(rng, which))
        order = rng.permutation(len(options))
        return Example(
            fields={"text": text},
            label=int(np.flatnonzero(order == 0)[0]),
            options=tuple(options[i] for i in order),
        )

    def _elsewhere(self, rng: np.random.Generator, which: int) -> int:
        """A sentence of another document."""
        if len(self._documents) == 1:
            return int(rng.integers(0, self.sentences.first[-1]))
        other = int(rng.integers(len(self._documents) - 1))
        document = self._documents[other + (other >= which)]
        return int(rng.integers(self.sentences.first[document], self.sentences.first[document + 1]))


@dataclass(frozen=True)
class NextSentenceTask(MixtureTask):
    """The mixture's only task; its data are hashed by the corpus, not by all examples that can be made."""

    key: str = ""

    def train_sha256(self) -> str:
        """Hash of what the examples are made from and how."""
        return hashlib.sha256(self.key.encode()).hexdigest()


def next_sentence_task(
    folder: Path, tokenizer: Tokenizer, max_tokens: int, *, dev_limit: int, seed: int, cache: Path
) -> NextSentenceTask:
    """Training examples from a corpus, and dev examples from documents that are held out (1 %, at least one).

    Raises:
        UsageError: no text, too few documents, or no room for two options.
    """
    sentences = Sentences(folder, cache)
    formatter = MrcFormatter(CARD, tokenizer, max_tokens)
    numbers = np.arange(len(sentences.first) - 1)
    held_out = numbers % _HELD_OUT == _HELD_OUT - 1 if len(numbers) >= _HELD_OUT else numbers == numbers[-1]
    train = NextSentences(sentences, numbers[~held_out], formatter, seed)
    own = NextSentences(sentences, numbers[held_out], formatter, seed + 1)
    examples = [own.example(i) for i in range(min(dev_limit, len(own)))]
    dev = [x for i, example in enumerate(examples) for x in formatter.inputs(example, i)]
    made_from = [sentences.key, max_tokens, seed, tokenizer.tokens(), _SAME_DOCUMENT]
    key = json.dumps(made_from, ensure_ascii=False)
    return NextSentenceTask(CARD, train, examples, dev, key)

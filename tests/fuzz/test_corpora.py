"""Plain text to train on, and what a run keeps of it: packed sequences, sentences, where they end."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path

import numpy as np
import pytest

from fuzz.campaign import campaign, damaged_bytes, foreign
from mp2.backbone.tokenizer import SPECIAL_TOKENS, Tokenizer
from mp2.training.corpus import corpus_files, folder_tokenizer, pack, paragraphs
from mp2.training.next_sentence import Sentences

TEXT = "今天天气很好。我们去看花。\n路上人很多。\n\n面条很好吃。价格也公道。\n\n房间太小。早餐很差。\n" * 4
TOKENIZER = Tokenizer.from_vocab([*SPECIAL_TOKENS.values(), *sorted(set(TEXT) - {"\n"})])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(TEXT, "utf-8")
    return tmp_path / "corpus"


def damaged_array(rng: random.Random, data: bytes) -> bytes:
    """A ``.npy`` file with another header, or other numbers."""
    head, numbers = data[:128], data[128:]
    kind = rng.random()
    if kind < 0.4:
        for old, new in (("<u2", "<i8"), ("<i8", "|O"), ("False", "True"), ("(", "(-"), (",", ",9")):
            if rng.random() < 0.4:
                head = head.replace(old.encode(), new.encode(), 1)
        return head[:128].ljust(128) + numbers
    if kind < 0.6:
        return head + numbers[: rng.randrange(len(numbers))]
    at = rng.randrange(len(numbers))
    return head + numbers[:at] + bytes([rng.randrange(256)]) + numbers[at + 1 :]


@pytest.mark.parametrize("ending", ["txt", "txt.xz"])
def test_text(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    data = TEXT.encode()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for line in paragraphs(path):
            line.encode()

    campaign(f"text {ending}", lzma.compress(data) if ending.endswith("xz") else data, read, (damaged_bytes,))


def test_packed_sequences(corpus: Path, tmp_path: Path) -> None:
    files, cache = corpus_files(corpus), tmp_path / "cache"
    good = np.array(pack(files, TOKENIZER, 16, cache))
    (path,) = cache.iterdir()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = pack(files, TOKENIZER, 16, cache)
        assert found.dtype == np.uint16
        assert found.shape[1] == 16
        assert found.max(initial=0) < TOKENIZER.vocab_size  # else rows of the embedding that are not there
        assert good.shape[1] == 16

    campaign("packed", path.read_bytes(), read, (damaged_array, damaged_array, damaged_bytes))


@pytest.mark.parametrize("ending", [".ends.npy", ".first.npy", ".txt"])
def test_sentences(corpus: Path, tmp_path: Path, ending: str) -> None:
    cache = tmp_path / "cache"
    Sentences(corpus, cache)
    (path,) = cache.glob(f"*{ending}")
    good = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = Sentences(corpus, cache)
        for number in range(int(found.first[-1])):
            found[number].encode()

    damages = (foreign, damaged_bytes) if ending == ".txt" else (damaged_array, damaged_array, damaged_bytes)
    campaign(f"sentences {ending}", good, read, damages)


def test_source_of_a_vocabulary(corpus: Path, tmp_path: Path) -> None:
    """A vocabulary of another text or size is never taken for this one's."""
    files, digests = corpus_files(corpus), [("a.txt", 3, "a" * 64)]
    first = folder_tokenizer(files, digests, tmp_path, 150, begun=False, say=lambda line: None)
    path = tmp_path / "vocab_source.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = folder_tokenizer(files, digests, tmp_path, 150, begun=False, say=lambda line: None)
        assert found.tokens() == first.tokens()
        assert json.loads(path.read_text())["vocab_size"] == 150

    campaign("vocabulary's source", path.read_bytes(), read)

"""From text to vocabulary, packed sequences and first embeddings."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
from tiny_words import tiny_vocab

from mp2.backbone import Tokenizer
from mp2.backbone.tokenizer import SPECIAL_TOKENS
from mp2.errors import FormatError, UsageError
from mp2.training.corpus import build_vocab, corpus_files, pack, paragraphs, ppmi_embeddings

LINES = ["这个东西真的很好，不错。", "", "天气今日晴有雨！ab12", "旅游美食体育", "“科技健康”教育？"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "b.txt").write_text("\n".join(LINES * 7) + "\n", "utf-8")
    with lzma.open(folder / "a.txt.xz", "wt", encoding="utf-8") as file:
        file.write("\n".join(reversed(LINES)))
    (folder / "README.md").write_text("not text to train on")
    (folder / "folder.txt").mkdir()
    return folder


def test_files_are_read_in_name_order_compressed_or_not(corpus: Path) -> None:
    files = corpus_files(corpus)
    assert [f.name for f in files] == ["a.txt.xz", "b.txt"]
    assert list(paragraphs(files[0])) == list(reversed(LINES))


def test_the_vocabulary_is_special_tokens_then_latin_then_characters_by_frequency(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("很很很很好好好不不错 A\n", "utf-8")
    vocab = build_vocab([tmp_path / "a.txt"], 10_000)
    assert vocab[:5] == list(SPECIAL_TOKENS.values())
    assert vocab[-4:] == ["很", "好", "不", "错"]
    latin = vocab[5:-4]
    for token in ("a", "z", "##a", "0", "##9", "，", "。", "“", "("):
        assert token in latin
    assert "A" not in vocab
    assert len(set(vocab)) == len(vocab)
    assert build_vocab([tmp_path / "a.txt"], len(vocab) - 2) == vocab[:-2]


def test_every_character_of_the_corpus_can_be_spelled_with_a_large_enough_vocabulary(corpus: Path) -> None:
    tokenizer = Tokenizer.from_vocab(build_vocab(corpus_files(corpus), 10_000))
    for line in LINES:
        assert tokenizer.unk_id not in tokenizer.encode(line).ids


def test_packing_loses_nothing_but_an_unfilled_last_sequence_and_marks_where_documents_end(
    corpus: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_vocab(tiny_vocab())
    files = corpus_files(corpus)
    packed = pack(files, tokenizer, 12, tmp_path / "cache")
    assert packed.dtype == np.uint16
    assert set(packed[:, 0]) == {tokenizer.cls_id}
    assert set(packed[:, -1]) == {tokenizer.sep_id}
    lines = [line for f in files for line in [*paragraphs(f), ""]]
    stream = [i for line in lines for i in (tokenizer.encode(line).ids if line else [tokenizer.sep_id])]
    assert stream.count(tokenizer.sep_id) == 2 + 7 + 1  # one document begins with a file, one ends it
    body = packed[:, 1:-1].ravel().tolist()
    assert body == stream[: len(body)]
    assert 0 <= len(stream) - len(body) < 10


def test_packing_is_kept_and_made_again_for_other_settings_or_files(corpus: Path, tmp_path: Path) -> None:
    tokenizer, cache = Tokenizer.from_vocab(tiny_vocab()), tmp_path / "cache"
    first = np.array(pack(corpus_files(corpus), tokenizer, 12, cache))
    [kept] = cache.iterdir()
    stamp = kept.stat().st_mtime_ns
    assert np.array_equal(pack(corpus_files(corpus), tokenizer, 12, cache), first)
    assert kept.stat().st_mtime_ns == stamp
    assert pack(corpus_files(corpus), tokenizer, 20, cache).shape[1] == 20
    other = Tokenizer.from_vocab([*tiny_vocab(), "猫"])
    pack(corpus_files(corpus), other, 12, cache)
    with (corpus / "b.txt").open("a") as file:
        file.write("天气今日晴有雨天气今日晴有雨\n")
    assert len(pack(corpus_files(corpus), tokenizer, 12, cache)) > len(first)
    assert len(list(cache.iterdir())) == 4


def test_packing_is_made_again_when_the_text_changes_but_name_and_size_do_not(
    corpus: Path, tmp_path: Path
) -> None:
    tokenizer, cache = Tokenizer.from_vocab(tiny_vocab()), tmp_path / "cache"
    first = np.array(pack(corpus_files(corpus), tokenizer, 12, cache))
    text = (corpus / "b.txt").read_text("utf-8")
    (corpus / "b.txt").write_text(text.replace("天气", "旅游"), "utf-8")
    assert (corpus / "b.txt").stat().st_size == len(text.encode())
    assert not np.array_equal(pack(corpus_files(corpus), tokenizer, 12, cache), first)
    (corpus / "b.txt").write_text(text, "utf-8")
    (corpus / "b.txt").rename(corpus / "c.txt")  # the same content in the same order
    assert np.array_equal(pack(corpus_files(corpus), tokenizer, 12, cache), first)
    assert len(list(cache.iterdir())) == 2


def brute_ppmi(packed: np.ndarray, size: int, window: int) -> np.ndarray:
    counts = np.zeros((size, size))
    for row in packed[:, 1:-1].tolist():
        for i, a in enumerate(row):
            for j in range(max(0, i - window), min(len(row), i + window + 1)):
                if i != j:
                    counts[a, row[j]] += 1
    total, marginal = counts.sum(), counts.sum(1)
    ppmi = np.zeros_like(counts)
    for a, b in zip(*np.nonzero(counts), strict=True):
        ppmi[a, b] = max(0.0, np.log(counts[a, b] / total / (marginal[a] / total) / (marginal[b] / total)))
    return ppmi


def topics(n_rows: int = 150) -> np.ndarray:
    """Rows of one topic each: tokens 5-8, 9-12 or 13-16."""
    rng = np.random.default_rng(0)
    bodies = [rng.integers(5 + 4 * (i % 3), 9 + 4 * (i % 3), 14) for i in range(n_rows)]
    return np.array([[2, *body, 3] for body in bodies], np.uint16)


def test_first_embeddings_factorise_ppmi_counted_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    mixed = rng.integers(5, 17, (20, 16))  # keeps the topics from being rank three
    packed = np.concatenate([topics(), mixed]).astype(np.uint16)
    vectors = ppmi_embeddings(packed, 17, 6, window=2)
    u, s, _ = np.linalg.svd(brute_ppmi(packed, 17, 2))
    expected = (u[:, :6] * s[:6]) @ u[:, :6].T
    got = vectors.astype(np.float64) @ vectors.T
    scale = (got * expected).sum() / (expected**2).sum()
    assert np.abs(got / scale - expected).max() < 0.02 * np.abs(expected).max()
    assert vectors.std() == pytest.approx(0.02, rel=1e-3)


def test_nearest_neighbours_share_their_topic() -> None:
    vectors = ppmi_embeddings(topics(), 17, 5)[5:]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T - 2 * np.eye(12)
    for token in range(12):
        nearest = np.argsort(-cosine[token])[:3]
        assert {int(n) // 4 for n in nearest} == {token // 4}


def test_first_embeddings_depend_on_the_seed_alone_and_fill_up_with_zeros() -> None:
    import torch

    state = torch.random.get_rng_state()
    first = ppmi_embeddings(topics(), 17, 24, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(5)
    assert np.array_equal(first, ppmi_embeddings(topics(), 17, 24, seed=3))
    assert first.shape == (17, 24)
    assert first.dtype == np.float32
    assert not first[:, 17:].any()


def test_a_folder_without_text_is_a_usage_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"no \*\.txt or \*\.txt\.xz files in {tmp_path}"):
        corpus_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b"\xff\xfe\xfa"), ("a.txt.xz", b"not xz"), ("a.txt.xz", lzma.compress(b"a" * 999)[:-20])],
)
def test_damaged_text_is_a_format_error_that_names_the_file(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=rf"{name}: not UTF-8 text"):
        list(paragraphs(tmp_path / name))

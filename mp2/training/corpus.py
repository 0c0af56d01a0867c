"""Plain text -> a compact vocabulary and packed token sequences for masked language modelling."""

from __future__ import annotations

import hashlib
import lzma
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mp2.backbone.tokenizer import SPECIAL_TOKENS, Tokenizer
from mp2.errors import FormatError, UsageError, shown
from mp2.files import own_folder, whole_file, write_json, write_text
from mp2.json_files import read_object
from mp2.text_files import check_file

_ALWAYS = (
    "abcdefghijklmnopqrstuvwxyz0123456789，。！？：；、“”‘’（）《》【】…—·,.!?:;'\"()<>[]{}-_/\\@#$%&*+=~^|` "
)


AGAIN = "take this file away, and it is made again"


def corpus_files(folder: Path) -> list[Path]:
    """All ``*.txt`` and ``*.txt.xz`` files of a folder, in name order."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}, expected one of *.txt or *.txt.xz files")
    files = sorted(p for p in folder.glob("*") if p.name.endswith((".txt", ".txt.xz")) and p.is_file())
    if not files:
        raise UsageError(f"no *.txt or *.txt.xz files in {folder}, expected UTF-8 text, one paragraph a line")
    return files


def paragraphs(path: Path) -> Iterator[str]:
    """Non-empty lines of a text file; a blank line (document boundary) is yielded as an empty string."""
    check_file(path)
    opener = lzma.open if path.suffix == ".xz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for line in file:
                yield line.strip()
    except (lzma.LZMAError, UnicodeDecodeError, EOFError) as error:
        raise FormatError(f"not UTF-8 text: {error}", path=path) from error


def build_vocab(files: Sequence[Path], size: int) -> list[str]:
    """Special tokens, Latin letters and digits (whole and as ``##...``), then the commonest characters."""
    vocab = list(SPECIAL_TOKENS.values())
    latin = [c for c in _ALWAYS if not c.isspace()]
    vocab += latin + ["##" + c for c in _ALWAYS if c.isalnum()]
    if size <= len(vocab):
        raise UsageError(
            f"--vocab-size {size}, expected more than {len(vocab)}: special tokens, letters, digits and "
            "punctuation are always in it"
        )
    counts: Counter[str] = Counter()
    for path in files:
        for line in paragraphs(path):
            counts.update(line.lower())
    known = set(vocab)
    for character, _ in counts.most_common():
        if len(vocab) >= size:
            break
        if character not in known and not character.isspace() and character.isprintable():
            vocab.append(character)
    return vocab


def file_digests(files: Sequence[Path]) -> list[tuple[str, int, str]]:
    """Name, bytes and sha256 of each file."""
    found = []
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found.append((path.name, path.stat().st_size, digest))
    return found


def pack(files: Sequence[Path], tokenizer: Tokenizer, length: int, cache: Path) -> NDArray[np.uint16]:
    """Token sequences [n, length], each ``[CLS] text ... [SEP]``, text running on across paragraphs.

    Where a document ends within a sequence, there is a [SEP] too: a sequence without one inside is a passage
    of one document, and so is a pair of neighbours without any.

    The result is kept in the folder ``cache``, keyed by a hash of the files' content, the vocabulary and the
    length, and memory-mapped.
    """
    if tokenizer.vocab_size > np.iinfo(np.uint16).max:
        raise UsageError(
            f"vocabulary of {tokenizer.vocab_size} tokens, expected at most 65535 for packed corpora"
        )
    content = [digest for _, _, digest in file_digests(files)]
    key = hashlib.sha256(repr([content, tokenizer.tokens(), length, "[SEP]"]).encode()).hexdigest()[:16]
    path = cache / f"packed-{key}.npy"
    if not path.is_file():
        chunks: list[NDArray[np.uint16]] = []
        batch: list[str] = []
        for line in document_lines(files):
            batch.append(line)
            if len(batch) == 20_000:
                chunks.append(_encode(batch, tokenizer))
                batch = []
        chunks.append(_encode(batch, tokenizer))
        body = length - 2
        stream = np.concatenate(chunks)
        n = len(stream) // body
        packed = np.empty((n, length), np.uint16)
        packed[:, 0] = tokenizer.cls_id
        packed[:, 1:-1] = stream[: n * body].reshape(n, body)
        packed[:, -1] = tokenizer.sep_id
        own_folder(cache)
        with whole_file(path) as partial, partial.open("wb") as packed_file:
            np.save(packed_file, packed)
    kept: NDArray[np.uint16] = load_array(path, np.uint16, 2)
    if kept.shape[1] != length or (kept.size and int(kept.max()) >= tokenizer.vocab_size):
        raise FormatError(
            f"has rows of {kept.shape[1]} and tokens up to {int(kept.max(initial=0))}, expected rows of "
            f"{length} and tokens below {tokenizer.vocab_size}; {AGAIN}",
            path=path,
        )
    return kept


def load_array(path: Path, dtype: type[np.generic], n_axes: int) -> NDArray[Any]:
    """An array that ``np.save`` wrote, memory-mapped; raises ``FormatError`` for anything else.

    Not by ``np.load``, which leaves the file open where its header is damaged.
    """
    check_file(path)
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a header that is damaged into one of Python 2
            if npy.read_magic(file) != (1, 0):
                raise ValueError("of another version")
            shape, by_columns, kind = npy.read_array_header_1_0(file)
            offset = file.tell()
    except Exception as error:  # of a damaged header NumPy raises what Python's own parser does
        said = " ".join(str(error).split())[:200]
        raise FormatError(f"not a NumPy array: {said}; {AGAIN}", path=path) from error
    n_values, n_bytes = math.prod(shape), path.stat().st_size - offset
    if kind != dtype or len(shape) != n_axes or by_columns or n_bytes != n_values * kind.itemsize:
        raise FormatError(
            f"is {kind} of shape {shown(shape)} in {n_bytes} bytes, expected {np.dtype(dtype)} of {n_axes} "
            f"axes; {AGAIN}",
            path=path,
        )
    if not n_values:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape)


def document_lines(files: Sequence[Path]) -> Iterator[str]:
    """The paragraphs of all files, and an empty string after each document."""
    previous = ""
    for file in files:
        for line in chain(paragraphs(file), [""]):
            if line or previous:
                yield line
            previous = line


def _encode(lines: Sequence[str], tokenizer: Tokenizer) -> NDArray[np.uint16]:
    """Token ids of all lines in a row; an empty one, a document's end, is [SEP]."""
    end = [tokenizer.sep_id]
    encoded = tokenizer.encode_ids(lines)
    ids = [i for line, found in zip(lines, encoded, strict=True) for i in (found if line else end)]
    return np.asarray(ids, np.uint16)


def ppmi_embeddings(
    packed: NDArray[np.uint16], vocab_size: int, dim: int, *, window: int = 4, seed: int = 0
) -> NDArray[np.float32]:
    """Token vectors [vocab_size, dim] from positive pointwise mutual information and truncated SVD.

    Levy & Goldberg (2014): factorise max(0, log p(a,b) / (p(a) p(b))) of co-occurrences within ``window``;
    vectors are U sqrt(S), scaled to the standard deviation 0.02 that BERT starts from.
    """
    import torch

    pairs = np.zeros(vocab_size * vocab_size, np.float64)
    for offset in range(1, window + 1):
        left, right = packed[:, 1 : -1 - offset], packed[:, 1 + offset : -1]
        codes = left.astype(np.int64) * vocab_size + right
        for part in np.array_split(codes.ravel(), max(1, codes.size // 20_000_000)):
            pairs += np.bincount(part, minlength=vocab_size * vocab_size)
    joint = pairs.reshape(vocab_size, vocab_size)
    joint = joint + joint.T
    row = joint.sum(1)
    total = max(row.sum(), 1.0)
    scale = np.maximum(row, 1.0)
    with np.errstate(divide="ignore"):
        ppmi = np.maximum(np.log(joint * total / scale[:, None] / scale[None, :]), 0.0)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)  # svd_lowrank takes no generator
    try:
        u, s, _ = torch.svd_lowrank(
            torch.from_numpy(ppmi.astype(np.float32)), q=min(dim, vocab_size), niter=4
        )
    finally:
        torch.random.set_rng_state(generator_state)
    vectors = (u * s.sqrt()).numpy()
    vectors = vectors / max(float(vectors.std()), 1e-12) * 0.02
    if vectors.shape[1] < dim:
        vectors = np.pad(vectors, ((0, 0), (0, dim - vectors.shape[1])))
    return np.ascontiguousarray(vectors, dtype=np.float32)


def folder_tokenizer(
    files: Sequence[Path],
    digests: Sequence[tuple[str, int, str]],
    out: Path,
    size: int,
    *,
    begun: bool,
    say: Callable[[str], None],
) -> Tokenizer:
    """The vocabulary of the training folder ``out``; made of ``files`` where there is none.

    What a run that had not ``begun`` (no checkpoint) left there is made anew if it is of other text or size.
    ``vocab_source.json`` says of which text and size it was made. It is written first, so that a run stopped
    between the two leaves nothing that looks like another's.
    """
    vocab_file, source_file = out / "vocab.txt", out / "vocab_source.json"
    source = {"vocab_size": size, "files": [list(digest) for digest in digests]}
    if vocab_file.is_file():
        made_here = source_file.is_file()
        if begun or (made_here and _says(source_file, source)):
            return Tokenizer.from_folder(out)  # a checkpoint of another vocabulary is refused when it is read
        if not made_here or (out / "model.safetensors").is_file():
            raise UsageError(
                f"{vocab_file} is there already and was not made from this --corpus with --vocab-size "
                f"{size}; give another --out, or take that file away"
            )
        say("vocabulary: made anew, a run stopped before its first checkpoint left one of other text or size")
        vocab_file.unlink()
    write_json(source_file, source, indent=1)
    tokenizer = Tokenizer.from_vocab(build_vocab(files, size))
    write_text(vocab_file, "\n".join(tokenizer.tokens()) + "\n")
    return tokenizer


def _says(file: Path, values: dict[str, Any]) -> bool:
    try:
        return bool(read_object(file) == values)
    except FormatError:  # damaged
        return False

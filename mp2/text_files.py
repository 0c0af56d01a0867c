"""Files that somebody gave us, as text: regular files, UTF-8 with or without a byte order mark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mp2.errors import FormatError

MAX_BYTES = 128 * 2**20  # the largest tokenizer.json that is published has some 35 MB
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_file(path: Path) -> None:
    """Raise ``FormatError`` unless ``path`` is a regular file (or a link to one) and no git-lfs pointer.

    A clone without git-lfs has small text files, pointers, where large files should be.
    """
    if not path.exists():
        raise FormatError("no such file", path=path)
    if not path.is_file():  # a folder, a pipe, a device
        raise FormatError("is no regular file", path=path)
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise FormatError(
            "is a git-lfs pointer, not the file itself: run 'git lfs pull' in the folder that was cloned, "
            "or download the file",
            path=path,
        )


def read_text(path: Path, expected: str) -> str:
    """The text of ``path`` without a byte order mark; ``expected`` says in errors what should be there."""
    check_file(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise FormatError(f"has {size:,} bytes, expected {expected} of at most {MAX_BYTES:,}", path=path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 text: {error}; expected {expected}", path=path) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        FormatError: no such file, not JSON, not an object.
    """
    return parse_object(read_text(path, "a JSON object"), path)


def parse_object(text: str, path: Path) -> dict[str, Any]:
    """The JSON object that ``text``, the content of ``path``, is; errors as of ``read_object``."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: numbers of thousands of digits too
        raise FormatError(f"not JSON: {error}", path=path) from error
    if not isinstance(raw, dict):
        raise FormatError(f"is a JSON {type(raw).__name__}, expected an object", path=path)
    return raw

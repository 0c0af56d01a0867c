"""Files that somebody gave us, as text: regular files, UTF-8 with or without a byte order mark."""

from __future__ import annotations

from pathlib import Path

from mp2.errors import FormatError, shown

MAX_BYTES = 128 * 2**20  # the largest tokenizer.json that is published has some 35 MB
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_file(path: Path) -> None:
    """Raise ``FormatError`` unless ``path`` is a regular file (or a link to one) and no git-lfs pointer.

    A clone without git-lfs has small text files, pointers, where large files should be.
    """
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise FormatError(str(error.strerror), path=shown(str(path), 120)) from error
    if not there:
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


def read_text(path: Path, expected: str, *, max_bytes: int = MAX_BYTES) -> str:
    """The text of ``path`` without a byte order mark; ``expected`` says in errors what should be there."""
    check_file(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise FormatError(f"has {size:,} bytes, expected {expected} of at most {max_bytes:,}", path=path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 text: {error}; expected {expected}", path=path) from error

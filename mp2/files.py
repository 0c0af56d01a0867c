"""Files that are there whole or not at all, whenever the process or the machine stops.

Nothing is written through a symbolic link: what is made beside a file has a name that nobody can guess and
is created anew, and a file that grows is refused where it is a link (docs/security.md).
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mp2.errors import Mp2Error, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor

_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # for a pipe's other end
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to: flushed to the disk at the end, then renamed over ``path``.

    A block that ends in an exception leaves ``path`` as it was, and nothing beside it; what a process that
    was killed left there is taken away.
    """
    stem = f".{path.name[:40]}."
    _take_away_left(path.parent, stem)
    partial = path.with_name(f"{stem}{secrets.token_hex(8)}.part")
    held = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666)
    try:
        _hold(held)  # says that it is not left over
        yield partial
        written = os.open(partial, os.O_RDONLY | _NO_FOLLOW)  # a library may have put another file there
        try:
            os.fsync(written)
        finally:
            os.close(written)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):  # a full disk names none
            error.filename = str(path)
        raise
    finally:
        os.close(held)


def _take_away_left(folder: Path, stem: str) -> None:
    left = re.compile(re.escape(stem) + r"[0-9a-f]{16}\.part")
    for name in os.listdir(folder) if fcntl is not None else ():
        if not left.fullmatch(name):
            continue
        try:
            number = os.open(folder / name, os.O_RDWR | os.O_NONBLOCK | _NO_FOLLOW)
        except OSError:
            continue
        try:
            if _hold(number):
                os.unlink(folder / name)
        except OSError:
            continue
        finally:
            os.close(number)


def _hold(number: int) -> bool:
    """Lock an open file; False: another process has it, or the file system knows no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def own_folder(path: Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        UsageError: it is a symbolic link, or no folder: what is written in it would be elsewhere.
    """
    if path.is_symlink():
        raise UsageError(
            f"{path} is a symbolic link, and mp2 writes through none: put the folder itself there"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"{path} is a file, expected a folder, or nothing") from error
    return path


def open_own(path: Path, flags: int) -> int:
    """``os.open`` of a file that we write in place (a journal, a lock), made if it is not there.

    Where a file that would be changed has other names too (hard links, as some backups make), it is copied
    first: what the other names lead to stays as it is.

    Raises:
        UsageError: it is a symbolic link, a pipe, a socket or a device: it would be written to where that
            leads, or wait for ever.
    """
    opened = (flags & ~os.O_TRUNC) | os.O_CREAT | _NO_WAIT | _NO_FOLLOW
    try:
        number = os.open(path, opened, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP or path.is_symlink():
            raise UsageError(
                f"{path} is a symbolic link, and mp2 writes through none: put the file itself there"
            ) from error
        if error.errno == errno.ENXIO:
            raise UsageError(f"{path} is no regular file: take it away") from error
        raise
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path} is no regular file: take it away")
        if flags & (os.O_TRUNC | os.O_APPEND) and found.st_nlink > 1:
            write_bytes(path, b"" if flags & os.O_TRUNC else path.read_bytes())
            os.close(number)
            number = os.open(path, opened, 0o666)
        if flags & os.O_TRUNC:
            os.ftruncate(number, 0)
    except BaseException:
        os.close(number)
        raise
    return number


def own_opener(name: str | os.PathLike[str], flags: int) -> int:
    """``open_own`` as the ``opener`` of ``open``."""
    return open_own(Path(name), flags)


def open_to_append(path: Path) -> BinaryIO:
    """The file opened for appending, without a buffer; errors as of ``open_own``."""
    return open(path, "ab", buffering=0, opener=own_opener)


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write to a file without a buffer, which may take a part only; raises ``OSError`` (full disk)."""
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        error.filename = error.filename or file.name
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; bytes of a path that is no UTF-8 as escapes."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def json_bytes(values: Any, *, indent: int | None = None, sort_keys: bool = False) -> bytes:
    """JSON in UTF-8; raises ``ValueError`` for a number that is not finite.

    Bytes of a path that is no UTF-8, half surrogates in Python, are written as JSON's escapes: read back,
    they are the same path.
    """
    text = json.dumps(values, ensure_ascii=False, indent=indent, sort_keys=sort_keys, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def write_json(path: Path, values: Mapping[str, Any], *, indent: int = 2) -> None:
    """Write a JSON file, whole or not at all; see ``json_bytes``."""
    write_bytes(path, json_bytes(values, indent=indent) + b"\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        Mp2Error: the system refused (full disk, ...).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole_file(path) as partial:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(on_cpu, partial, dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise Mp2Error(f"cannot write {path}: {error}; make room") from error

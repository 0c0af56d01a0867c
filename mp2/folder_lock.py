"""One process a folder: a lock that the system drops with the process, however that ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mp2.errors import RunLockedError, UsageError
from mp2.files import open_own
from mp2.messages import say

LOCK = "lock"  # in every folder of a run
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # of some network file systems


class ReadOnlyFolderError(UsageError):
    """Nothing can be written in a folder, and so nothing locked; what is there may still be read."""


@contextmanager
def folder_lock(folder: Path, taken: str) -> Iterator[None]:
    """Hold the lock of ``folder``; where the file system has no locks, one line on stderr says so.

    Raises:
        RunLockedError: another process has it; the message is ``taken``.
        ReadOnlyFolderError: nothing can be written there.
        UsageError: the lock is a symbolic link, or no file.
    """
    try:
        number = open_own(folder / LOCK, os.O_RDWR)
    except OSError as error:
        kind = ReadOnlyFolderError if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else UsageError
        raise kind(f"cannot write in {folder}: {error.strerror}; a run writes in its folder") from error
    try:
        _lock(number, folder, taken)
        yield
    finally:
        os.close(number)


def _lock(number: int, folder: Path, taken: str) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise RunLockedError(taken) from error
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunLockedError(taken) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UsageError(f"cannot lock {folder / LOCK}: {error.strerror}") from error
        say(f"the file system of {folder} has no locks: nothing would stop a second process there")

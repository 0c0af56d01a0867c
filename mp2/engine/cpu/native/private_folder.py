"""The folder where compiled kernels are kept: ours alone, because what lies in it is loaded and run."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path


class NoPrivateFolderError(Exception):
    """There is no folder that nobody else can write to."""


def private_folder() -> Path:
    """Return ``mp2/kernels`` in the user's cache folder; made on first use with mode 0700.

    The cache folder is ``XDG_CACHE_HOME`` if that is an absolute path and ours, else ``~/.cache``. Nobody
    else (but root) may be able to write to the folder or to put another one in its place.

    Raises:
        NoPrivateFolderError: neither can be used, with the reason for each.
    """
    faults = []
    for base in _bases():
        folder = (base / "mp2" / "kernels").resolve()
        try:
            fault = _fault(folder)
            if not fault:
                _make(folder)
                fault = _fault(folder)
        except OSError as error:
            fault = f"{error.filename or folder}: {error.strerror}"
        if not fault:
            return folder
        faults.append(fault)
    raise NoPrivateFolderError(
        f"no cache folder for them ({'; '.join(faults) or 'there is no home'}): "
        "set XDG_CACHE_HOME to a folder that only you can write to"
    )


def _bases() -> Iterator[Path]:
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # of another one the XDG specification says to ignore it
        yield Path(named)
    try:
        home = Path.home()
    except RuntimeError:
        return
    if home.is_absolute():
        yield home / ".cache"


def _make(folder: Path) -> None:
    for path in (*reversed(folder.parents), folder):
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)


def _fault(folder: Path) -> str:
    """Tell what lets others write to ``folder`` or replace it; of what does not exist, nothing is said."""
    ours = (folder, *folder.parents[:2])  # kernels, mp2, the cache folder
    for path in (folder, *folder.parents):
        if not path.exists():
            continue
        state = path.stat()
        mode = stat.S_IMODE(state.st_mode)
        if not stat.S_ISDIR(state.st_mode):
            return f"{path} is no folder"
        owners = (os.geteuid(),) if path in ours else (os.geteuid(), 0)
        if state.st_uid not in owners:
            return f"{path} belongs to user {state.st_uid}, expected {os.geteuid()}"
        if path == folder and mode & 0o077:
            return f"{path} has mode {mode:o}, expected 700; delete it"
        # in a sticky folder such as /tmp nobody can replace what belongs to us
        if mode & 0o022 and (path in ours or not mode & stat.S_ISVTX):
            return f"others can write to {path} (mode {mode:o})"
    return ""

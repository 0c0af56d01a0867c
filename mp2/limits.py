"""Limits that every command shares: seeds, threads, memory, folders to write to; checked before any work."""

from __future__ import annotations

import os
from pathlib import Path

from mp2.errors import UsageError

MAX_SEED = 2**53  # JSON holds it exactly, and every generator takes it
MAX_THREADS = 1024  # OpenMP does not survive much more


def check_seed(seed: int) -> None:
    """Raise ``UsageError`` for a seed that some generator would not take."""
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"seed is {seed}, expected 0 to {MAX_SEED}")


def check_threads(threads: int | None) -> None:
    """Raise ``UsageError`` for a number of threads that no machine has; None: the runtime's choice."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"threads is {threads}, expected 1 to {MAX_THREADS}")


def memory_bytes() -> int | None:
    """Main memory of the machine; None where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def check_new_folder(folder: Path) -> None:
    """Raise ``UsageError`` where a folder (``--out``) is none and cannot be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"--out {folder}: {there} is a file, expected a folder; choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--out {folder}: nothing can be written in {there}; choose another --out")

"""Limits that every command shares: seeds, threads, memory, folders to write to; checked before any work."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

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


def check_utf8(path: Path, option: str, library: str) -> None:
    """Raise ``UsageError`` for a path that is no UTF-8, which ``library`` could not open."""
    try:
        str(path.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            f"{option} {path.absolute()}: {library} opens no path whose name is not UTF-8; give another"
        ) from None


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process can keep busy, by its affinity mask and its cgroups' quota.

    A container's quota (docker ``--cpus``, a pod's CPU limit) leaves the mask as it is, so more threads than
    it pays for would only wait for each other. ``root`` is where ``proc`` and ``sys`` lie.
    """
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([mask, *(math.ceil(quota) for quota in _cgroup_quotas(root))]))


def _cgroup_quotas(root: Path) -> Iterator[float]:
    """Yield the quotas, in cores, of this process' cgroup and all above it, version 1 and 2.

    Inside a container the path that ``/proc/self/cgroup`` gives may be the host's, of which nothing is
    mounted; the mount's own folder is then the container's.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":  # version 2
            mounts, read = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"], _quota_of_version_2
        elif "cpu" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / name for name in (controllers, "cpu")]
            read = _quota_of_version_1
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            for folder in (own, *own.parents):
                try:
                    quota = read(mount / folder)
                except (OSError, ValueError, IndexError):
                    continue  # not mounted, or of a kernel without quotas
                if quota is not None:
                    yield quota


def _quota_of_version_2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_of_version_1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())

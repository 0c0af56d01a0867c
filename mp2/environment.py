"""What the command line puts into its environment before torch, which reads it once, is loaded.

A program that uses mp2 as a library gets none of this by itself. It can have the same before it imports
torch (or anything that does):

    from mp2 import environment
    environment.prepare()
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

from mp2.limits import usable_cores

# How often an idle OpenMP thread looks for work before it sleeps. GNU's default, 300,000 times, takes the
# core from whoever else could use it: beside one busy process a layer's visit took five times as long
# (benchmarks/speed/cpu_settings.py).
SPIN_COUNT = 1_000
_SPIN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_THREADS = "OMP_NUM_THREADS"
DATA = "MP2_DATA"
VARIABLES = (*_SPIN, _THREADS)


def data_folder() -> str | None:
    """MP2_DATA with ``~`` written out; None where it is not set."""
    named = os.environ.get(DATA)
    return os.path.expanduser(named) if named else None


def prepare(environment: MutableMapping[str, str] = os.environ, *, cores: int | None = None) -> None:
    """Let OpenMP threads sleep soon, and have no more of them than ``cores`` (None: what may be used).

    What the user set stays as it is. Without a quota the number of threads is left to torch. Does nothing
    once torch is loaded, which would not see it.
    """
    if "torch" in sys.modules:
        return
    if not any(name in environment for name in _SPIN):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = usable_cores() if cores is None else cores
    if _THREADS not in environment and cores < mask:
        environment[_THREADS] = str(cores)

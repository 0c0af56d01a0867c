"""Compile the package's C kernels with the machine's own compiler, once, for exactly its processor.

Without a compiler (or with ``MP2_NATIVE=0``) the callers do the same in torch, more slowly, and `mp2 doctor`
and the backend's reason say so. The library is kept in a folder that is ours alone, under a name made from
source, flags, compiler and processor, so that none of these can change unnoticed, beside a file with its
sha256. What does not match that, does not load or lacks a function is compiled again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from mp2.engine.cpu.native.interface import MACROS, declare
from mp2.engine.cpu.native.private_folder import NoPrivateFolderError, private_folder

FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # of -ffast-math, what does not lose NaN
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fassociative-math", "-fno-signed-zeros", "-freciprocal-math"),
    *MACROS,
)
_TIMEOUT_S = 120
_HERE = Path(__file__).parent
_SOURCES = ("attention.c", "dense.c", "differences.c", "tiles.c")
_HEADERS = ("difference_passes.h", "tiles.h", "vector_math.h")

_unfit = ""  # why `load` returned None


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the library made from this folder's C files; None where it cannot be made (see `unfit`)."""
    global _unfit
    try:
        library, _unfit = _load(), ""
        return library
    except (_UnavailableError, NoPrivateFolderError) as error:
        _unfit = str(error)
    except subprocess.CalledProcessError as error:
        told = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        _unfit = f"the compiler failed: {next((x for x in told if 'error' in x), told[0] if told else error)}"
    except (OSError, subprocess.SubprocessError) as error:
        _unfit = str(error)
    return None


def unfit() -> str:
    """Tell why there are no C kernels, in a line; "" where there are."""
    return "" if load() is not None else _unfit


def compiler() -> list[str]:
    """Return the compiler's command and its arguments: ``CC`` (as "gcc -m64"), else cc, gcc or clang."""
    try:
        words = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise _UnavailableError(f"CC is {os.environ['CC']!r}, expected a command ({error})") from None
    found = words or [x for x in map(shutil.which, ("cc", "gcc", "clang")) if x is not None][:1]
    if not found:
        raise _UnavailableError("no C compiler was found (cc, gcc or clang; CC names another)")
    return found


class _UnavailableError(Exception):
    """There is nothing to compile with, or what was compiled cannot be used."""


def _load() -> ctypes.CDLL:
    if os.environ.get("MP2_NATIVE") == "0":
        raise _UnavailableError("switched off by MP2_NATIVE=0")
    if not hasattr(os, "geteuid"):
        raise _UnavailableError("this system has no owners of files, which would make a cache of them safe")
    command = compiler()
    library = private_folder() / f"kernels-{_key(command)}.so"
    if _is_whole(library):
        try:
            # torch's OpenMP library is loaded already and answers to the same name: one pool of threads
            return declare(ctypes.CDLL(str(library)))
        except (OSError, AttributeError):
            pass  # of another libc, or without one of the functions
    return _compile(command, library)


def _key(command: list[str]) -> str:
    version = subprocess.run([*command, "--version"], capture_output=True, check=True, timeout=_TIMEOUT_S)
    h = hashlib.sha256(version.stdout + shlex.join([*command, *FLAGS]).encode())
    for name in _SOURCES + _HEADERS:
        h.update((_HERE / name).read_bytes())
    h.update(_processor().encode())
    return h.hexdigest()[:16]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return f"{platform.machine()} {platform.processor()}"
    lines = info.read_text().splitlines()
    return "".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))}))


def _sidecar(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_whole(library: Path) -> bool:
    """Tell whether ``library`` is there and as it was compiled: a full disk or a crash may have cut it."""
    try:
        return _sidecar(library).read_text("ascii") == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


def _compile(command: list[str], library: Path) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        sources = [str(_HERE / name) for name in _SOURCES]
        arguments = [*command, *FLAGS, *sources, "-o", str(made), "-lm"]
        subprocess.run(arguments, capture_output=True, check=True, timeout=_TIMEOUT_S)
        try:
            # under a name of its own: for a path that was loaded before, dlopen returns what was loaded then
            loaded = declare(ctypes.CDLL(str(made)))
        except (OSError, AttributeError) as error:
            raise _UnavailableError(f"what {shlex.join(command)} made cannot be used: {error}") from None
        with made.open("rb") as file:
            os.fsync(file.fileno())
        # each is whole or not there, whoever else compiles now; two that do not fit are compiled again
        digest = made.with_suffix(".sha256")
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest(), "ascii")
        made.replace(library)
        digest.replace(_sidecar(library))
    return loaded

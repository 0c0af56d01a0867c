"""Compile the package's C kernels with the machine's own compiler, once, for exactly its processor.

The kernels are optional: without a compiler (or with ``MP2_NATIVE=0``) the callers compute the same in torch,
more slowly, and `mp2 doctor` and the runtime's reason say so. The library is kept in the user's cache folder
under a name made from source, flags, compiler and processor, so that none of these can change unnoticed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # of -ffast-math, what does not lose NaN
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fassociative-math", "-fno-signed-zeros", "-freciprocal-math"),
)
_TIMEOUT_S = 120
_HERE = Path(__file__).parent
_SOURCES = ("attention.c", "dense.c", "int8.c")
_HEADERS = ("vector_math.h",)


_problem = ""  # why `load` returned None


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the library made from this folder's C files; None where it cannot be made (see `problem`)."""
    global _problem
    try:
        library, _problem = _load(), ""
        return library
    except _Unavailable as error:
        _problem = str(error)
    except subprocess.CalledProcessError as error:
        told = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        _problem = (
            f"the compiler failed: {next((x for x in told if 'error' in x), told[0] if told else error)}"
        )
    except (OSError, subprocess.SubprocessError) as error:
        _problem = str(error)
    return None


def problem() -> str:
    """Tell why there are no C kernels, in a line; "" where there are."""
    return "" if load() is not None else _problem


class _Unavailable(Exception):
    """There is nothing to compile with, or nowhere to keep what was compiled."""


def _load() -> ctypes.CDLL:
    if os.environ.get("MP2_NATIVE") == "0":
        raise _Unavailable("switched off by MP2_NATIVE=0")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise _Unavailable("no C compiler was found (cc, gcc or clang; CC names another)")
    library = _cache_dir() / f"kernels-{_key(compiler)}.so"
    # torch's OpenMP library is loaded already and answers to the same name: one pool of threads
    if library.is_file():
        try:
            return ctypes.CDLL(str(library))
        except OSError:
            pass  # damaged: a machine that stopped, a full disk
    _compile(compiler, library)
    return ctypes.CDLL(str(library))


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_TIMEOUT_S)
    h = hashlib.sha256(version.stdout + " ".join(_FLAGS).encode())
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


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError as error:
            raise _Unavailable(f"there is no cache folder ({error}): set XDG_CACHE_HOME") from None
    return Path(base) / "mp2"


def _compile(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, *_FLAGS, *(str(_HERE / name) for name in _SOURCES), "-o", str(made), "-lm"]
        subprocess.run(command, capture_output=True, check=True, timeout=_TIMEOUT_S)
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(library)  # whole or not at all, whoever else compiles it now

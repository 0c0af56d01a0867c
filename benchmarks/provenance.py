"""Where a number comes from: command, versions, code, machine, and its matrix rate in the same run."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

import mp2
from mp2.engine.onnx.library import load_onnxruntime

RESULTS = Path(__file__).parent / "results"
PACKAGE = Path(mp2.__file__).parent


def sgemm_rate(size: int = 1536, runs: int = 5) -> float:
    """FLOP/s of a float32 matrix product with the threads torch has now (median)."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / median(times)


def source_hash(package: Path = PACKAGE) -> str:
    """Return 12 hex digits of what runs: every Python and C file of ``package``, with its path.

    It names the code where there is no git, and where the tree is not what was committed.
    """
    digest = hashlib.sha256()
    files = [path for pattern in ("*.py", "*.c", "*.h") for path in package.rglob(pattern)]
    for name, path in sorted((path.relative_to(package).as_posix(), path) for path in files):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


SOURCE_SHA256 = source_hash()  # now: when a long measurement ends, the files may be others


def processor() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().split("\n") if "model name" in line]
        if names:
            return names[0]
    return platform.processor()


def provenance() -> dict[str, Any]:
    """Command, time, versions, commit (and whether the tree was dirty), hash of the code, processor, threads.

    Without git ``commit`` is empty and ``dirty`` null.
    """
    import transformers

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    module = "" if sys.modules["__main__"].__spec__ is None else sys.modules["__main__"].__spec__.name
    arguments = [
        "DIR" if argument.startswith("/") else argument for argument in sys.argv[1:]
    ]  # no machine's paths
    return {
        "command": " ".join(["python -m", module.removesuffix(".__main__"), *arguments]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "source_sha256": SOURCE_SHA256,
        "torch": torch.__version__,
        "onnxruntime": str(load_onnxruntime().__version__),
        "transformers": transformers.__version__,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "sgemm_gflops": round(sgemm_rate() / 1e9, 1),
    }


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write ``benchmarks/results/<name>.json`` with provenance."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"provenance": provenance(), "rows": rows}, indent=1, ensure_ascii=False) + "\n"
    )
    return path

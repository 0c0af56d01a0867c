"""Where a number comes from: command, versions, commit, machine, and its matrix rate in the same run."""

from __future__ import annotations

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

RESULTS = Path(__file__).parent / "results"


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


def provenance() -> dict[str, Any]:
    """Command, time, versions, commit (and whether the tree was dirty), processor, threads."""
    import onnxruntime
    import transformers

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().split("\n") if "model name" in line]
        cpu = names[0] if names else cpu
    module = "" if sys.modules["__main__"].__spec__ is None else sys.modules["__main__"].__spec__.name
    arguments = [
        "DIR" if argument.startswith("/") else argument for argument in sys.argv[1:]
    ]  # no machine's paths
    return {
        "command": " ".join(["python -m", module.removesuffix(".__main__"), *arguments]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu,
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

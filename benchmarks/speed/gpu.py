"""Everything that needs a GPU, in one command: tests, throughput, precision, Table 4, TensorRT.

    python -m benchmarks.speed.gpu [--data DIR] [--minutes 45] [--step NAME ...] [--again]

Each step is a process of its own whose output goes to --work and whose figures go to benchmarks/results/;
``benchmarks/results/gpu.json`` says what ran, for how long and how it ended. A step that ended well is not
done again (--again: it is), so that a lease that ends can be followed by another. Steps, in the order of
their worth; a step is not begun when the minutes are used up:

    tests       pytest -m cuda
    large       cpt-large's shape in bf16, fp8 and fp16; their rank agreement on the embedded backbone
    table4      Table 4 in bf16          table4-fp8  Table 4 in fp8
    throughput  mini, 1024 wide and cpt-large's shape, bf16 and fp8, against the plain loop
    together    five seeds as one against one after another, mini and cpt-large's shape
    tensorrt    TensorRT plans of the embedded backbone (where tensorrt is installed)

Table 4 and two tasks of throughput need --data; without it the demo tasks are timed and Table 4 is left out.
Exits 2 without a CUDA device and 1 if a step fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from benchmarks.provenance import save


def steps(data: Path | None, work: Path) -> dict[str, list[str]]:
    """Name -> arguments of Python, in the order of worth."""
    where = ["--data", str(data)] if data else []
    tasks = ["--task", "tnews", "lcqmc"] if data else []
    found = {
        "tests": ["-m", "pytest", "-m", "cuda", "tests"],
        "large": ["-m", "benchmarks.speed.precision", "--device", "cuda", "--large", *where, *tasks],
    }
    if data:
        common = ["-m", "benchmarks.speed.table4", *where, "--device", "cuda", "--work", str(work / "table4")]
        for precision, name in (("bf16", "table4"), ("fp8", "table4-fp8")):
            options = ["--precision", precision, "--budget-minutes", "8"]
            found[name] = [*common, *options, "--name", f"table4_cuda_{precision}"]
    engines = ["--engine", "torch:fp32", "torch:bf16", "torch:fp8"]
    shapes = ["--shape", "mini", "1024", "large", "--device", "cuda"]
    found["throughput"] = ["-m", "benchmarks.speed.throughput", *where, *tasks, *engines, *shapes]
    shapes = ["--shape", "mini", "large", "--device", "cuda", "--name", "together_cuda"]
    found["together"] = ["-m", "benchmarks.speed.together", *where, *tasks, *shapes]
    if importlib.util.find_spec("tensorrt") is not None:
        found["tensorrt"] = [
            "-m",
            "benchmarks.speed.tensorrt_engine",
            "--work",
            str(work / "tensorrt"),
            *where,
        ]
    return found


def run_step(name: str, arguments: list[str], work: Path, limit_s: float) -> dict[str, Any]:
    """Run one step for at most ``limit_s``; its output is shown and kept in ``work``."""
    start = time.perf_counter()
    log = work / f"{name}.log"
    print(f"== {name}: python {' '.join(arguments)}", flush=True)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            [sys.executable, "-u", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        killer = Timer(limit_s, process.terminate)
        killer.daemon = True
        killer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
        status = process.wait()
        killer.cancel()
    return {
        "step": name,
        "exit_status": status,
        "seconds": round(time.perf_counter() - start, 1),
        "tail": log.read_text("utf-8").splitlines()[-5:] if status else [],
    }


def main() -> None:
    """Run what is left of the steps, write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MP2_DATA"))
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--step", nargs="+", help="these only")
    parser.add_argument("--again", action="store_true", help="also what was done before")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"benchmarks.speed.gpu: torch {torch.__version__} sees no CUDA device; "
            "run this on a machine with a GPU and a CUDA build of torch",
            file=sys.stderr,
        )
        sys.exit(2)
    args.work.mkdir(parents=True, exist_ok=True)
    known = steps(Path(args.data) if args.data else None, args.work)
    for name in args.step or []:
        if name not in known:
            parser.error(f"no step '{name}'; there are {', '.join(known)}")
    end = time.perf_counter() + 60 * args.minutes
    rows = []
    for name in args.step or known:
        done = args.work / f"{name}.json"
        if done.is_file() and not args.again:
            rows.append(json.loads(done.read_text("utf-8")))
            continue
        left = end - time.perf_counter()
        if left < 30:
            rows.append({"step": name, "exit_status": None, "why": "no time was left"})
            continue
        row = run_step(name, known[name], args.work, left)
        rows.append(row)
        if row["exit_status"] == 0:
            done.write_text(json.dumps(row) + "\n", "utf-8")
    device = torch.cuda.get_device_properties(0)
    head = {
        "device": device.name,
        "memory_gib": round(device.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "capability": f"{device.major}.{device.minor}",
    }
    for row in rows:
        print(f"{row['step']:12} {'ok' if row['exit_status'] == 0 else row['exit_status']}", flush=True)
    print("written:", save("gpu", [head, *rows]))
    sys.exit(0 if all(row["exit_status"] == 0 for row in rows) else 1)


if __name__ == "__main__":
    main()

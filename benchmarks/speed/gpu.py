"""What the CUDA engine is and does on a GPU: one command, one process, at most seven minutes.

    python -m benchmarks.speed.gpu --out runs/gpu [--minutes 7] [--step NAME ...]

Needs this repository, a CUDA build of torch with its triton, transformers and numpy; nothing is downloaded.
Each measurement is a JSON line in OUT/gpu.jsonl, on disk before the next begins, so that nothing is lost
where a lease ends; so is each step's end: well, at its deadline, or with an error, which does not end the
others. Steps, with their deadlines in seconds:

    environment  10   versions, matrix rates, memory's rate
    prepare      30   the one random backbone, of cpt-large's shape, and its prompts
    parity       40   losses in all precisions, run, recorded and replayed, against float64
                      (gpu_reference.npz); that attention and steps are the fast ones
    large        70   share of the matrix rate, rank agreement with float32
    table4      120   2,880 evaluations of deep stage II over the lengths of lcqmc and tnews, with CMA-ES
                      where cma is here; then the plain loop and rivals A, B and C in fp16
    profile      40   the 25 longest kernels; milliseconds of each part of a layer
    flags        60   one kernel for attention, activation in the product: by turns, with and without
    mini         50   the embedded backbone: one run, and five by turns and side by side

--rehearse does all of it on a CPU at tiny sizes, which shows that the script works and nothing else; steps
then have five times as long. Exits 1
where a step failed, losses are off or a kernel is not the fast one, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import one_line_errors
from benchmarks.speed.gpu_reference import REFERENCE, SCALES
from benchmarks.speed.gpu_steps import STEPS, Bench

_LEAST_S = 3.0  # a step is not begun with less
_REHEARSAL = 5.0  # times the deadlines, which are a GPU's: a CPU may have other work as well


class Deadline(BaseException):
    """A step's time is over; nothing that guards against errors shall hold it."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `Deadline` inside after ``seconds``; a kernel or a compiler under way ends first."""

    def over(number: int, frame: Any) -> None:
        raise Deadline

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Ledger:
    """A file of JSON lines, each on disk before the next thing is done."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.step = ""
        self._began = time.perf_counter()

    def __call__(self, **values: Any) -> None:
        """Append ``values`` with the step and the time since the beginning, and show them."""
        line = {"step": self.step, "at_s": round(time.perf_counter() - self._began, 2), **values}
        text = json.dumps(line, ensure_ascii=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(text, flush=True)


def run_step(name: str, step: Callable[[Bench], None], bench: Bench, ledger: Ledger, seconds: float) -> bool:
    """Do one step within ``seconds``; False where it failed. What it holds on the device is given back."""
    ledger.step, started = name, time.perf_counter()
    ended: dict[str, Any] = {"ended": "well"}
    try:
        with deadline(seconds):
            step(bench)
    except Deadline:
        ended = {"ended": "deadline"}
    except Exception as error:  # one step's fault is no other's
        where = traceback.extract_tb(error.__traceback__)[-1]
        ended = {
            "ended": "error",
            "error": f"{type(error).__name__}: {error}"[:2000],
            "where": f"{Path(where.filename).name}:{where.lineno}",
        }
    ledger(**ended, seconds=round(time.perf_counter() - started, 2))
    gc.collect()
    if bench.on_gpu:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:  # the device is lost: the steps that follow will say so, too
            ledger(lost=str(error).splitlines()[0])
    return ended["ended"] == "well" or (ended["ended"] == "deadline" and name != "parity")


@one_line_errors()
def main() -> None:
    """Do the steps, say what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.jsonl, which is appended to")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--step", nargs="+", help="these only")
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny sizes")
    args = parser.parse_args()
    times = _REHEARSAL if args.rehearse else 1.0
    end = time.perf_counter() + 60 * times * args.minutes
    for name in args.step or []:
        if name not in STEPS:
            parser.error(f"no step '{name}'; there are {', '.join(STEPS)}")
    if not args.reference.is_file():
        parser.error(f"no file {args.reference}; python -m benchmarks.speed.gpu_reference writes it")
    if not args.rehearse and not torch.cuda.is_available():
        print(
            f"gpu: torch {torch.__version__} sees no CUDA device; run this on a machine with a GPU and a "
            "CUDA build of torch, or give --rehearse",
            file=sys.stderr,
        )
        sys.exit(2)
    args.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(args.out / "gpu.jsonl")
    scale = SCALES["tiny" if args.rehearse else "full"]
    bench = Bench("cpu" if args.rehearse else "cuda", scale, args.reference, ledger)
    failed = []
    for name, (seconds, step) in STEPS.items():
        if args.step and name not in args.step:
            continue
        left = end - time.perf_counter()
        if left < _LEAST_S:
            ledger.step = name
            ledger(ended="no time left")
            continue
        if not run_step(name, step, bench, ledger, min(times * seconds, left)):
            failed.append(name)
    ledger.step = "end"
    ledger(failed=failed, rehearsal=args.rehearse)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

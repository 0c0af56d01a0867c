"""What the C kernels and the spinning of OpenMP threads are worth on this processor and on lesser ones.

Each setting is a process of its own: it visits the middle layer of the embedded backbone (``layer_losses`` of
20 candidates on the 32 examples of ``demo_topic``) until ``--seconds`` are over, and gives the median of a
visit. Settings alternate for ``--rounds`` rounds; the table has the median of the rounds and their range.

``kernels`` runs on one thread and takes the thread's own time, which other processes do not lengthen:
all C kernels, without each, without any, in float32 and int8, on the machine's own level and as on AVX2.
``spin`` runs on ``--threads`` threads by the wall's clock, alone and beside one busy process.

    python -m benchmarks.speed.cpu_settings kernels [--rounds 5] [--seconds 4]
    python -m benchmarks.speed.cpu_settings spin [--threads 2] [--rounds 5] [--seconds 4]

Some minutes each. Results: ``cpu_settings_kernels.json``, ``cpu_settings_spin.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from benchmarks.speed.engine_work import INTRINSIC_DIM, PROMPT_TOKENS, make_backbone, task_inputs
from benchmarks.speed.forward_parts import clock
from benchmarks.speed.rounds import check_rounds, ranged, spread
from mp2.engine import Objective, create_backend
from mp2.prompts import random_prompts

POPULATION = 20
LEVELS = {
    "own": {},
    "AVX2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "CC": "cc -mno-avx512f",
    },
}
SPINS = ("default", "0", "1000", "10000")
BUSY = "while True: pass"


def visits(precision: str, without: str, seconds: float) -> list[float]:
    """Return the seconds of each visit of the middle layer."""
    with ExitStack() as stack:
        if without == "attention":
            stack.enter_context(mock.patch("mp2.engine.cpu.attention._native", return_value=False))
        if without == "second half":
            path = "mp2.engine.cpu.backend.make_second_half"
            stack.enter_context(mock.patch(path, return_value=None))
        backbone = make_backbone("mini")
        prompts = random_prompts(
            backbone, "deep", prompt_tokens=PROMPT_TOKENS, intrinsic_dim=INTRINSIC_DIM, seed=1
        )
        inputs = task_inputs("demo_topic", backbone, None, None)
        runtime = create_backend("torch", backbone, precision=precision)
        objective = Objective(runtime.forward(prompts), inputs)
        rng = np.random.default_rng(0)
        n_layers = backbone.config.n_layers
        objective.set_incumbent(rng.standard_normal((n_layers, INTRINSIC_DIM)).astype(np.float32))
        candidates = rng.standard_normal((POPULATION, INTRINSIC_DIM)).astype(np.float32)
        found: list[float] = []
        end = time.perf_counter() + seconds
        while len(found) < 3 or time.perf_counter() < end:  # the first prepares weights and is dropped
            start = clock()
            objective.layer_losses(n_layers // 2, candidates).fetch()
            found.append(clock() - start)
    return found[1:]


def child(setting: dict[str, Any], seconds: float) -> float:
    """Run one setting in a process of its own; its median in ms."""
    asked = [setting["precision"], setting["without"], str(setting["threads"]), str(seconds)]
    variables = {k: x for k, x in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    variables |= LEVELS[setting["level"]] | {"OMP_NUM_THREADS": str(setting["threads"])}
    if setting["spin"] != "default":
        variables["GOMP_SPINCOUNT"] = setting["spin"]
    if setting["without"] == "all":
        variables["MP2_NATIVE"] = "0"
    busy = [
        subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(1 if setting["beside"] == "busy" else 0)
    ]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.speed.cpu_settings", "one", *asked],
            env=variables,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    finally:
        for process in busy:
            process.kill()
    return float(json.loads(done.stdout)) * 1e3


def settings(what: str, threads: int) -> list[dict[str, Any]]:
    """The settings of a table, in the order of their rows."""
    usual = {"level": "own", "precision": "fp32", "without": "", "spin": "default", "beside": ""}
    if what == "spin":
        made = [{"threads": threads, "spin": spin, "beside": b} for b in ("", "busy") for spin in SPINS]
        made.append({"threads": 1, "beside": "busy"})
    else:
        made = [
            {"level": level, "precision": precision, "without": without, "threads": 1}
            for level in LEVELS
            for precision in ("fp32", "int8")
            if (level, precision) != ("AVX2", "int8")  # which is refused there
            for without in ("", "attention", "second half", "all")
            if (precision, without) != ("int8", "second half")  # which int8 does not use
        ]
    return [usual | one for one in made]


@one_line_errors()
def main() -> None:
    """Measure all settings, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["kernels", "spin"])
    parser.add_argument("--threads", type=int, default=2, help="of spin; kernels are timed on one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of each setting in each round")
    args = parser.parse_args()
    check_rounds(args.rounds)
    rows = settings(args.what, args.threads)
    found: list[list[float]] = [[] for _ in rows]
    for _ in range(args.rounds):
        for row, values in zip(rows, found, strict=True):
            values.append(child(row, args.seconds))
    for row, values in zip(rows, found, strict=True):
        row["visit_ms"] = spread(values, 2)
        words = [
            f"{name} {row[name]}" for name in ("level", "precision", "without", "spin", "beside", "threads")
        ]
        print(
            f"{ranged(row['visit_ms'], 2):>24} ms  {', '.join(x for x in words if x[-1] != ' ')}", flush=True
        )
    print("written:", save(f"cpu_settings_{args.what}", rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        torch.set_num_threads(int(sys.argv[4]))
        print(median(visits(sys.argv[2], sys.argv[3], float(sys.argv[5]))))
    else:
        main()

"""Share of optimizer, journal and Python in a run on the embedded backbone: outside forwards, and in them.

*Outside*: what ``result.json`` of a whole run calls suggest, journal and other, over the time of both
stages. Loading (libraries, data, weights) is reported apart; it is paid once.

*Inside*: one round of visits of stage II, all layers, timed whole and then operator by operator
(`benchmarks.speed.forward_parts`); what no operator and no C kernel accounts for is Python. The table of
parts says where a forward's time goes.

    python -m benchmarks.speed.python_share [--data DIR] [--task NAME ...] [--iters 600] [--threads 1]

Target: at most 3 % outside. A minute a task on one core.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from benchmarks.speed.forward_parts import clock, measured
from mp2.runs.config import BbtConfig
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.run import make_problem
from mp2.runs.series import start_run

OUTSIDE = ("suggest", "journal", "other")
ROUNDS = 3
N_PARTS = 8  # operators listed, the others are added up


def outside(seconds: dict[str, float]) -> dict[str, Any]:
    """Seconds by part and share outside forwards of a result's ``seconds``."""
    whole = seconds["stage1"] + seconds["stage2"]
    return {
        "seconds": {name: round(s, 3) for name, s in seconds.items()},
        "outside_share": round(sum(seconds[name] for name in OUTSIDE) / whole, 4),
        "outside_share_by_part": {name: round(seconds[name] / whole, 4) for name in OUTSIDE},
    }


def inside(problem: FewShotProblem) -> dict[str, Any]:
    """Milliseconds of one round of visits by operator, and the share of none of them."""
    objective, space = problem.objective, problem.model.space()
    rng = np.random.default_rng(0)
    z = space.fuse(np.ones((space.n_layers, space.n_modules), dtype=bool))
    moves = rng.standard_normal((problem.config.layers.popsize, space.n_dims)).astype(np.float32)
    objective.set_incumbent(z)

    def one_round() -> None:
        for layer in range(space.n_layers):
            candidates = z[layer] + np.float32(1e-2) * moves
            losses = objective.layer_losses(layer, candidates).fetch()
            objective.commit(layer, candidates[int(np.argmin(losses))])

    one_round()
    whole, kernels = [], []
    for _ in range(ROUNDS):  # taking turns, so that both see the same machine
        whole.append(_seconds(one_round))
        with measured() as parts:
            one_round()
        kernels.append(sum(parts.seconds.values()))
    ordered = sorted(parts.seconds.items(), key=lambda item: -item[1])
    share = {name: round(s / kernels[-1], 4) for name, s in ordered[:N_PARTS]}
    share["others"] = round(sum(s for _, s in ordered[N_PARTS:]) / kernels[-1], 4)
    return {
        "round_ms": round(1e3 * median(whole), 2),
        "operators_ms": round(1e3 * median(kernels), 2),
        "python_share": round(1 - median(kernels) / median(whole), 4),
        "share_of_operators": share,
    }


def _seconds(work: Callable[[], object]) -> float:
    start = clock()
    work()
    return clock() - start


def run(config: BbtConfig) -> dict[str, Any]:
    """One whole run and the parts of its forwards."""
    problem = make_problem(config)
    with TemporaryDirectory() as folder:
        result = start_run(config, Path(folder), model=problem.model)
    return {
        "task": config.task,
        "kind": problem.model.kind,
        "backbone": problem.model.backbone.name,
        "iterations": result["iterations"],
        **outside(result["seconds"]),
        "forward": inside(problem),
    }


@one_line_errors()
def main() -> None:
    """Measure all tasks, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MP2_DATA"))
    parser.add_argument("--task", nargs="+")
    parser.add_argument("--iters", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    tasks = args.task or ["demo_sentiment", *(["lcqmc"] if args.data else [])]
    rows = []
    for task in tasks:
        data = str(args.data) if args.data else None
        row = run(
            BbtConfig(
                task=task,
                data=data,
                head="span",
                iters=args.iters,
                threads=args.threads,
                test=False,
                baselines=False,
            )
        )
        rows.append(row)
        print(
            f"{task}: {100 * row['outside_share']:.1f}% outside forwards, "
            f"{100 * row['forward']['python_share']:.1f}% of a forward is Python; loading "
            f"{row['seconds']['load']:.1f} s, both stages "
            f"{row['seconds']['stage1'] + row['seconds']['stage2']:.1f} s",
            flush=True,
        )
        for name, share in row["forward"]["share_of_operators"].items():
            print(f"  {100 * share:5.1f}%  {name}")
    print("written:", save("python_share", rows))


if __name__ == "__main__":
    main()

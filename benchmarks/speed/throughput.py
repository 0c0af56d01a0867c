"""Speed of the engine, per backbone shape, task and runtime, beside a plain PyTorch loop and the machine.

For each: ms an iteration in stage I (all layers, populations of 20 routers) and at every layer of stage II;
necessary FLOP/s (`benchmarks.speed.engine_work.necessary_flops`) and their share of the matrix rate
measured beside it (float32 on a CPU, so bf16 and int8 can exceed 1); peak memory; ratio to the plain loop and
to the rivals A, B and C (`benchmarks.speed.rivals`: what a good engineer would write), which take turns with
the engines layer by layer (`benchmarks.speed.throughput_rounds`); and rank agreement with
fp32 of every engine but the first in fp32, least and median over the first populations of every layer and
round. One "iteration" is one candidate on the whole few-shot set. Every figure is a median over
``--rounds`` with least and most, ratios and shares are taken within a round, and a target is met only where
every round is above it (`verdict`).

    python -m benchmarks.speed.throughput --data DIR [--shape mini mini-m50 1024 cpt-large] [--task NAME ...]
        [--engine torch:fp32 torch:bf16 torch:int8 onnxruntime:fp32] [--device cuda] [--rounds 5] [--growth]

``mini`` is the embedded backbone with its embedded prompts (m = 16), ``mini-m50`` the same backbone with
random prompts of the paper's m = 50; other shapes are random and have m = 50. Rounds that are done are kept
in ``--work``: a measurement can be cut into pieces by ``--minutes`` or Ctrl-C, and the same command goes on.
A task is written as soon as its rounds are done. ``1024`` (6 layers) has the first 8 examples of a task,
``cpt-large`` (24 layers) the first 4; both visit two layers a round and search 5 routers. ``--growth``
measures cost against the number of examples, length, population and layers instead, and draws
throughput_growth.png (15 minutes; ``--no-rivals`` leaves A, B and C out of it).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from benchmarks.speed.engine_work import MINI_PAPER, SHAPES, Engine
from benchmarks.speed.rivals import RIVALS
from benchmarks.speed.rounds import Pieces, check_rounds, ranged
from benchmarks.speed.throughput_rounds import Comparison, Record
from benchmarks.speed.throughput_rows import RATIO_TARGET, SHARE_TARGET, rows

LABELS = {"mini": "mini", MINI_PAPER: "mini shape, m = 50"}


def compare(
    shape: str,
    task: str,
    engines: Sequence[Engine],
    n_rounds: int,
    device: str,
    data: Path | None,
    folder: Path,
    work: Path,
    minutes: float,
) -> list[dict[str, Any]] | None:
    """Rows of all ``engines`` on one shape and task; None where ``minutes`` were over before all rounds."""
    pieces = Pieces(work, [shape, task, [str(engine) for engine in engines], device, str(data)], minutes)
    comparison: Comparison | None = None

    def measure(number: int) -> Record:
        nonlocal comparison
        comparison = comparison or Comparison(shape, task, engines, device, data, folder)
        return comparison.round(number)

    records = [pieces.get(f"{shape}-{task}-{i}", lambda i=i: measure(i)) for i in range(n_rounds)]  # type: ignore[misc]
    done = [record for record in records if record is not None]
    return rows(done) if len(done) == n_rounds else None


HEAD = (
    f"{'shape':18} {'task':15} {'engine':17} {'plain ms':>24} {'stage I ms':>24} {'stage II ms':>24} "
    f"{'times plain, II':>19} {f'over {RATIO_TARGET:g}':>9} {'times A, B, C':>16} {'share of rate, I':>17} "
    f"{f'over {SHARE_TARGET:g}':>9} {'MB':>6} {'rank agreement: least':>21} {'median':>7}"
)


def line(row: dict[str, Any]) -> str:
    """A row of the printed table: medians (least-most)."""
    label = LABELS.get(row["shape"], f"{row['layers']} x {row['hidden']}")
    rivals = ", ".join(f"{row['rival_ratios'][kind]['median']:.2f}" for kind in RIVALS)
    ranks = [f"{row[key]:.4f}" if key in row else "" for key in ("spearman_min", "spearman_median")]
    return (
        f"{label:18} {row['task']:15} {row['runtime']}:{row['precision']:{16 - len(row['runtime'])}} "
        f"{ranged(row['plain_ms'], 1):>24} {ranged(row['stage1_ms'], 1):>24} "
        f"{ranged(row['stage2_ms'], 1):>24} {ranged(row['stage2_ratio'], 2):>19} "
        f"{row['stage2_ratio_verdict']:>9} {rivals:>16} {ranged(row['stage1_share'], 2):>17} "
        f"{row['stage1_share_verdict']:>9} {row['peak_mb']:6} {ranks[0]:>21} {ranks[1]:>7}"
    )


@one_line_errors(goes_on=True)
def main() -> None:
    """Measure what is asked for, print a table, write JSON (and curves)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MP2_DATA"))
    parser.add_argument(
        "--shape",
        nargs="+",
        default=["mini", MINI_PAPER, "256", "1024"],
        choices=["mini", MINI_PAPER, *SHAPES],
    )
    parser.add_argument("--task", nargs="+")
    parser.add_argument("--engine", nargs="+", default=["torch:fp32", "torch:bf16", "torch:int8"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5, help="samples of everything, at least 3")
    parser.add_argument("--growth", action="store_true", help="cost against size instead")
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True, help="in --growth")
    parser.add_argument("--minutes", type=float, default=240.0, help="then no round is begun")
    parser.add_argument("--work", type=Path, default=Path("runs/throughput"), help="where rounds are kept")
    parser.add_argument("--engines", type=Path, default=Path("engines"), help="where engine folders are kept")
    parser.add_argument("--name", default="throughput", help="name of the result files")
    args = parser.parse_args()
    check_rounds(args.rounds)
    if args.threads:
        torch.set_num_threads(args.threads)
    engines = [Engine.parse(text) for text in args.engine]
    if args.growth:
        from benchmarks.speed.throughput_growth import measure

        done = measure(
            engines, args.device, args.engines, args.name, args.work, args.minutes, args.rounds, args.rivals
        )
        if done:
            print("written:", *done)
        return
    end = time.perf_counter() + 60 * args.minutes
    tasks = args.task or (["tnews", "lcqmc"] if args.data else ["demo_topic", "demo_sentiment"])
    print(HEAD, flush=True)
    suffix = "" if args.device == "cpu" else "_cuda"
    for shape in args.shape:
        found: list[dict[str, Any]] = []
        n_left = 0
        for task in tasks:
            minutes = (end - time.perf_counter()) / 60
            new = compare(
                shape, task, engines, args.rounds, args.device, args.data, args.engines, args.work, minutes
            )
            n_left += new is None
            for row in new or []:
                print(line(row), flush=True)
            found += new or []
        if n_left:
            print(f"{shape}: {n_left} tasks are left; run it again", flush=True)
        if found:
            print("written:", save(f"{args.name}_{shape}{suffix}", found))


if __name__ == "__main__":
    main()

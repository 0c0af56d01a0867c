"""Throughput of ``mp2 pretrain`` (frozen backbone, deep and shallow) beside a plain HF + PyTorch loop.

Both train the same prompts over the same backbone in one process, by turns, on the same batches in the same
order: rounds of as many steps each, in every other one the plain loop first. Examples/s and their ratio,
taken within a round, are medians over the rounds with least and most. The loops are first shown to compute
the same loss on a batch of each task (``benchmarks/plain_training.py`` says how the other one works). Ours
includes sampling, prefetching, the check for non-finite losses and gradients, and the optimizer; the plain
loop makes a batch (as ours are made) when it needs it.

The share of the matrix rate counts only what the mathematics needs on real (not padded) tokens: all products
of the forward pass, and in the backward pass those of the gradients that reach prompts (a frozen backbone has
no weight gradients, and layer 0 no gradient of its text). The rate is that of a large matrix product in the
same precision, measured before and after, the larger taken. With one CPU thread, times are the process's CPU
seconds, so that other work on the machine does not count; else wall time, as the data-wait share always is.

    python -m benchmarks.speed.pretrain_speed [--data DIR] [--shape mini 256 1024 cpt-large] [--device cuda]

DIR holds waimai/, kuake_qic/, bq/ and cmrc2018/; without it the embedded demo tasks are used. The default
shapes take about five minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from benchmarks.speed.engine_work import shaped_backbone
from benchmarks.speed.plain_training import PlainTraining
from benchmarks.speed.rounds import check_rounds, ranged, spread
from mp2.backbone import Backbone, load_backbone
from mp2.tasks import MrcInput, load_card
from mp2.training import PretrainConfig, Pretrainer, span_loss
from mp2.training.mixture import Batch, MixtureTask, load_mixture, pad
from mp2.training.prefetch import Prefetcher
from mp2.training.ranks import Ranks

TASKS = ["waimai", "kuake_qic", "bq", "cmrc2018"]
MAX_TOKENS, BATCH = 128, 32
SHAPES = {"256": (4, 256, 8), "1024": (6, 1024, 16), "cpt-large": (24, 1024, 16)}  # layers, hidden, heads


def make_backbone(shape: str) -> Backbone:
    """The embedded backbone, or a random one of that shape with its vocabulary."""
    return load_backbone("mini") if shape == "mini" else shaped_backbone(*SHAPES[shape])


def needed_flops(backbone: Backbone, run: PretrainConfig, lengths: list[int]) -> float:
    """Floating-point operations of one step on sequences of these lengths, frozen backbone."""
    c, m, d = backbone.config, run.prompt_tokens, run.intrinsic_dim
    total = 0.0
    for t in lengths:
        for layer in range(c.n_layers):
            rows, keys = (t, t + m) if run.kind == "deep" else (t + m, t + m)
            project = 2 * rows * c.hidden * c.hidden  # one of query, key, value, attention output
            attend = 2 * 2 * rows * keys * c.hidden
            forward = 4 * project + attend + 4 * rows * c.hidden * c.ffn
            # of the input: as the forward; attention's products have two inputs each
            backward = forward + attend
            if layer == 0 and run.kind == "deep":
                backward -= 3 * project  # nothing below the first layer's text projections is trained
            total += forward + backward
        total += 3 * 2 * t * c.hidden * 2  # the span head, its weights trained
    layers = c.n_layers if run.kind == "deep" else 1
    total += layers * 3 * 2 * d * m * c.hidden  # z A, both trained
    if run.kind == "deep":
        total += layers * 2 * 2 * 2 * m * c.hidden * c.hidden  # prefix keys and values, and back to p
    return total


def clock(device: torch.device) -> Callable[[], float]:
    """CPU seconds of this process on one CPU thread, else wall seconds."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def matrix_rate(device: torch.device, precision: str, size: int = 1536, runs: int = 7) -> float:
    """FLOP/s of a large matrix product in that precision (median)."""
    size = 8192 if device.type == "cuda" else size
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times, now = [], clock(device)
    for _ in range(runs + 2):
        _wait(device)
        start = now()
        a @ b
        _wait(device)
        times.append(now() - start)
    return 2 * size**3 / median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def same_loss(run: Pretrainer, plain: PlainTraining) -> float:
    """Largest difference between the two losses on one batch of each task, under all modules."""
    worst = 0.0
    for task in range(len(run.tasks)):
        batch = _batch(task, run.tasks[task].train[:BATCH], run.pad_id).to(run.ranks.device)
        weights = torch.full_like(run.model.prompts.routers[task], 0.5)
        with torch.no_grad():
            theirs = float(plain.loss(batch, weights))
            logits = run.model.prompts(run.model.encoder, batch.input_ids, batch.mask, weights)
            ours = float(span_loss(*logits, batch.mask, batch.start, batch.end))
        worst = max(worst, abs(ours - theirs))
    return worst


def _batch(task: int, inputs: Sequence[MrcInput], pad_id: int) -> Batch:
    ids, mask = (torch.from_numpy(x) for x in pad(inputs, pad_id))
    start, end = (torch.tensor([getattr(x, side) for x in inputs]) for side in ("start", "end"))
    return Batch(task, ids, mask, start, end, torch.full((len(inputs),), 1 / len(inputs)))


def measure(
    shape: str, kind: Any, tasks: list[MixtureTask], backbone: Backbone, args: argparse.Namespace
) -> dict[str, Any]:
    """Time one shape and kind."""
    device = torch.device(args.device)
    n_steps = (args.rounds + 1) * args.steps
    config = PretrainConfig(
        kind=kind,
        steps=n_steps,
        batch_size=BATCH,
        max_tokens=MAX_TOKENS,
        precision=args.precision,
        dev_limit=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Pretrainer(backbone, tasks, config, Path(folder), ranks=Ranks(device=device))
    plain = PlainTraining(backbone, run.model.prompts, config.rates, device, args.precision)
    difference = same_loss(run, plain)
    rate = matrix_rate(device, args.precision)
    rows: list[dict[str, float]] = []
    with Prefetcher(run.make_batch, 0, n_steps) as batches:
        for number in range(args.rounds + 1):
            steps = range(number * args.steps, (number + 1) * args.steps)
            row = _round(run, plain, batches, steps, plain_first=bool(number % 2))
            if number:  # the first round warms up
                lengths = [int(n) for step in steps for n in run.make_batch(step).mask.sum(1)]
                row |= {"tokens": float(sum(lengths)), "examples": float(len(lengths))}
                rows.append(row | {"flops": needed_flops(backbone, config, lengths)})
    rate = max(rate, matrix_rate(device, args.precision))
    return {
        "shape": shape,
        "layers": backbone.config.n_layers,
        "hidden": backbone.config.hidden,
        "kind": kind,
        "device": device.type,
        "precision": args.precision,
        "steps_timed": args.rounds * args.steps,
        "mean_tokens": round(sum(r["tokens"] for r in rows) / sum(r["examples"] for r in rows), 1),
        "ours_examples_per_s": spread([r["examples"] / r["ours_s"] for r in rows], 2),
        "plain_examples_per_s": spread([r["examples"] / r["plain_s"] for r in rows], 2),
        "ratio": spread([r["plain_s"] / r["ours_s"] for r in rows], 3),
        "ours_share_of_matrix_rate": spread([r["flops"] / r["ours_s"] / rate for r in rows], 3),
        "plain_share_of_matrix_rate": spread([r["flops"] / r["plain_s"] / rate for r in rows], 3),
        "matrix_gflops": round(rate / 1e9, 1),
        "data_wait_share": round(sum(r["wait_s"] for r in rows) / sum(r["wall_s"] for r in rows), 4),
        "clock": clock(device).__name__,
        "loss_difference": float(f"{difference:.1e}"),
    }


def _round(
    run: Pretrainer, plain: PlainTraining, batches: Prefetcher[Batch], steps: range, *, plain_first: bool
) -> dict[str, float]:
    """Seconds of both loops on the batches of ``steps``; of ours also on the wall and waiting for data."""
    device = run.ranks.device
    now = clock(device)

    def plain_s() -> float:
        start = now()
        for step in steps:
            plain.step(run.make_batch(step))
        _wait(device)
        return now() - start

    _wait(device)
    found = {"plain_s": plain_s()} if plain_first else {}
    waited = batches.waited_s
    start, begun = now(), time.perf_counter()
    for _ in steps:
        run.train_step(batches.next())
    _wait(device)
    found |= {"ours_s": now() - start, "wall_s": time.perf_counter() - begun}
    found["wait_s"] = batches.waited_s - waited
    return found if plain_first else found | {"plain_s": plain_s()}


@one_line_errors()
def main() -> None:
    """Time all shapes, deep and shallow; print a table; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--shape", nargs="+", default=["mini", "256"], choices=["mini", *SHAPES])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=7, help="samples of everything, at least 3")
    parser.add_argument("--steps", type=int, default=2, help="steps a round")
    args = parser.parse_args()
    check_rounds(args.rounds)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = TASKS if args.data else ["demo_sentiment", "demo_topic"]
    cards = [load_card(name) for name in names]
    speeds = f"{'ours ex/s':>22} {'plain ex/s':>22} {'ratio':>17}"
    print(f"{'shape':>10} {'kind':8} {speeds} {'share':>19} {'wait':>6}")
    rows = []
    for shape in args.shape:
        backbone = make_backbone(shape)
        limit = min(MAX_TOKENS, backbone.config.max_positions - 50)
        tasks = load_mixture(cards, args.data, backbone.tokenizer, limit, dev_limit=1, log=print)
        for kind in ("deep", "shallow"):
            row = measure(shape, kind, tasks, backbone, args)
            rows.append(row)
            ours, theirs = [ranged(row[key], 1) for key in ("ours_examples_per_s", "plain_examples_per_s")]
            share = ranged(row["ours_share_of_matrix_rate"], 3)
            print(
                f"{shape:>10} {kind:8} {ours:>22} {theirs:>22} {ranged(row['ratio'], 2):>17} "
                f"{share:>19} {row['data_wait_share']:6.2%}",
                flush=True,
            )
        name = (
            "pretrain_speed" if args.device == "cpu" else f"pretrain_speed_{torch.device(args.device).type}"
        )
        print("written:", save(name, rows), flush=True)


if __name__ == "__main__":
    main()

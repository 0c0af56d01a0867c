"""Throughput of ``mp2 pretrain`` (frozen backbone, deep and shallow) beside a plain HF + PyTorch loop.

Both train the same prompts over the same backbone and tasks in one process, by turns: rounds of as many steps
each, the same task at each step. Examples/s are medians over the rounds. The loops are first shown to compute
the same loss on a batch of each task (``benchmarks/plain_training.py`` says how the other one works). Ours
includes sampling, prefetching, the check for non-finite losses and gradients, and the optimizer.

The share of the matrix rate counts only what the mathematics needs on real (not padded) tokens: all products
of the forward pass, and in the backward pass those of the gradients that reach prompts (a frozen backbone has
no weight gradients, and layer 0 no gradient of its text). The rate is that of a large matrix product in the
same precision, measured before and after, the larger taken. With one CPU thread, times are the process's CPU
seconds, so that other work on the machine does not count; else wall time, as the data-wait share always is.

    python -m benchmarks.pretrain_speed [--data DIR] [--shape mini 256 1024 cpt-large] [--device cuda]

DIR holds waimai/, kuake_qic/, bq/ and cmrc2018/; without it the embedded demo tasks are used. A few minutes
on one core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.command import one_line_errors
from benchmarks.engine_work import shaped_backbone
from benchmarks.plain_training import PlainTraining
from benchmarks.provenance import save
from mp2.backbone import Backbone, load_backbone
from mp2.tasks import load_card
from mp2.training import PretrainConfig, Pretrainer, span_loss
from mp2.training.mixture import Batch, MixtureTask, load_mixture, sample_batch
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
        inputs = list(run.tasks[task].train[:BATCH])
        ids, mask, start, end = plain.pad(inputs)
        weights = torch.full_like(run.model.prompts.routers[task], 0.5)
        batch = Batch(
            task, ids, mask.bool(), start, end, torch.full((len(inputs),), 1 / len(inputs)).to(ids.device)
        )
        with torch.no_grad():
            theirs = float(plain.loss((ids, mask, start, end), weights))
            logits = run.model.prompts(run.model.encoder, batch.input_ids, batch.mask, weights)
            ours = float(span_loss(*logits, batch.mask, batch.start, batch.end))
        worst = max(worst, abs(ours - theirs))
    return worst


def measure(
    shape: str, kind: Any, tasks: list[MixtureTask], backbone: Backbone, args: argparse.Namespace
) -> dict[str, Any]:
    """Time one shape and kind."""
    device = torch.device(args.device)
    large = shape in ("1024", "cpt-large") and device.type == "cpu"
    rounds, per_round = (3, 1) if large else (args.rounds, args.steps)
    n_steps = (rounds + 1) * per_round
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
    plain = PlainTraining(backbone, run.model.prompts, tasks, config.rates, BATCH, device, args.precision)
    difference = same_loss(run, plain)
    rate = matrix_rate(device, args.precision)
    rows: list[dict[str, float]] = []
    now = clock(device)
    with Prefetcher(run.make_batch, 0, n_steps) as batches:
        for number in range(rounds + 1):
            first = number * per_round
            drawn = [
                sample_batch(tasks, s, batch_size=BATCH, seed=config.seed, pad_id=run.pad_id)
                for s in range(first, first + per_round)
            ]
            lengths = [int(n) for batch in drawn for n in batch.mask.sum(1)]
            waited = batches.waited_s
            _wait(device)
            start, begun = now(), time.perf_counter()
            for _ in range(per_round):
                run.train_step(batches.next())
            _wait(device)
            middle, ended = now(), time.perf_counter()
            for batch in drawn:
                plain.step(batch.task)
            _wait(device)
            end = now()
            if number:  # the first round warms up
                rows.append(
                    {
                        "ours_s": middle - start,
                        "plain_s": end - middle,
                        "wall_s": ended - begun,
                        "wait_s": batches.waited_s - waited,
                        "flops": needed_flops(backbone, config, lengths),
                        "tokens": float(sum(lengths)),
                        "examples": float(len(lengths)),
                    }
                )
    rate = max(rate, matrix_rate(device, args.precision))
    ours, theirs = (median(r["examples"] / r[key] for r in rows) for key in ("ours_s", "plain_s"))
    return {
        "shape": shape,
        "layers": backbone.config.n_layers,
        "hidden": backbone.config.hidden,
        "kind": kind,
        "device": device.type,
        "precision": args.precision,
        "steps_timed": rounds * per_round,
        "mean_tokens": round(sum(r["tokens"] for r in rows) / sum(r["examples"] for r in rows), 1),
        "ours_examples_per_s": round(ours, 1),
        "plain_examples_per_s": round(theirs, 1),
        "ratio": round(median(r["plain_s"] / r["ours_s"] for r in rows), 2),
        "ratios": [round(r["plain_s"] / r["ours_s"], 2) for r in rows],
        "ours_share_of_matrix_rate": round(median(r["flops"] / r["ours_s"] for r in rows) / rate, 3),
        "plain_share_of_matrix_rate": round(median(r["flops"] / r["plain_s"] for r in rows) / rate, 3),
        "matrix_gflops": round(rate / 1e9, 1),
        "data_wait_share": round(sum(r["wait_s"] for r in rows) / sum(r["wall_s"] for r in rows), 4),
        "clock": now.__name__,
        "loss_difference": float(f"{difference:.1e}"),
    }


@one_line_errors()
def main() -> None:
    """Time all shapes, deep and shallow; print a table; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--shape", nargs="+", default=["mini", "256"], choices=["mini", *SHAPES])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="steps a round")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    names = TASKS if args.data else ["demo_sentiment", "demo_topic"]
    cards = [load_card(name) for name in names]
    print(
        f"{'shape':>10} {'kind':8} {'ours ex/s':>10} {'plain ex/s':>10} {'ratio':>6} {'share':>6} {'wait':>6}"
    )
    rows = []
    for shape in args.shape:
        backbone = make_backbone(shape)
        limit = min(MAX_TOKENS, backbone.config.max_positions - 50)
        tasks = load_mixture(cards, args.data, backbone.tokenizer, limit, dev_limit=1, log=print)
        for kind in ("deep", "shallow"):
            row = measure(shape, kind, tasks, backbone, args)
            rows.append(row)
            speeds = (row["ours_examples_per_s"], row["plain_examples_per_s"], row["ratio"])
            shares = (row["ours_share_of_matrix_rate"], row["data_wait_share"])
            print(
                f"{shape:>10} {kind:8} {speeds[0]:10.1f} {speeds[1]:10.1f} {speeds[2]:6.2f} "
                f"{shares[0]:6.1%} {shares[1]:6.2%}",
                flush=True,
            )
        name = (
            "pretrain_speed" if args.device == "cpu" else f"pretrain_speed_{torch.device(args.device).type}"
        )
        print("written:", save(name, rows), flush=True)


if __name__ == "__main__":
    main()

"""Prefix or inline, division by K or by the sum, hard or soft router: measured on one frozen backbone.

Section 3.2 of the paper leaves the injection open; the authors' code adds prompts to m placeholder positions
before every layer (``mp2/backbone/encoder.py``), mp2 puts them before every layer's keys and values. Here
deep prompts are pre-trained three times over the same frozen backbone, with the same seed, batches, steps and
rates: as prefixes, inline, and as prefixes whose routers are divided by their sum. Then each is tuned by
gradient on downstream tasks (``benchmarks/paper/methods.py`` says what the methods are), beside prompt
tuning from scratch under both injections.

    python -m benchmarks.paper.ablation --upstream DIR --data DIR             # started again, it goes on
    python -m benchmarks.paper.ablation --upstream DIR --data DIR --minutes 3 # begins nothing new after 3
    python -m benchmarks.paper.ablation --upstream DIR --data DIR --table

About 45 core-minutes with ``mini`` (4 layers of 128). Equal budget means equal steps and examples; an inline
sequence is m rows longer. A backbone that was trained beside prefix prompts (``mini`` was: docs/mini.md)
favours prefixes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import one_line_errors
from benchmarks.paper.cells import Cell, cell_file, claim_folder, work_through
from benchmarks.paper.methods import METHODS, Lab, Settings
from benchmarks.paper.table3 import write_results
from benchmarks.provenance import RESULTS, provenance
from mp2.backbone import Backbone, load_backbone
from mp2.errors import UnknownNameError
from mp2.files import write_json
from mp2.prompts import load_prompts
from mp2.runs.series import one_blas_thread, sigterm_exits
from mp2.tasks import load_card
from mp2.training import PretrainConfig, pretrain

UPSTREAM = ("waimai", "online_shopping", "thucnews", "toutiao_tc", "bq", "cote_dp")
TASKS = ("lcqmc", "chnsent", "cote_mfw", "amazon", "tnews")
SEEDS = (8, 13)
ABLATED = (
    *("majority", "gradient", "gradient-inline", "gradient-scratch", "gradient-scratch-inline"),
    *("gradient-soft", "gradient-sum"),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "inline": {"injection": "inline"},
    "sum": {"router_normalisation": "sum"},
}


def pretrain_config(args: argparse.Namespace, variant: str) -> PretrainConfig:
    """What every variant shares, with its own choice; rates and annealing as in the recipe of ``mini``."""
    return PretrainConfig(
        **VARIANTS[variant],
        prompt_tokens=args.prompt_tokens,
        intrinsic_dim=args.intrinsic_dim,
        steps=args.steps,
        router_lr=0.05,
        prompt_lr=5e-3,
        schedule="linear",
        warmup_steps=args.steps // 20,
        temperature_end=0.1,
        max_tokens=args.max_tokens,
        precision="bf16",
        dev_limit=60,
        checkpoint_minutes=0.5,
    )


def needed(methods: Sequence[str]) -> list[str]:
    """The variants that methods are tuned from."""
    wanted = {"prefix"}  # its head is everybody's where nothing else is pre-trained
    for method in methods:
        if method.endswith("-sum"):
            wanted.add("sum")
        if method in ("gradient-inline", "deep-inline"):
            wanted.add("inline")
    return [variant for variant in VARIANTS if variant in wanted]


def pretrained(args: argparse.Namespace, variant: str, backbone: Backbone) -> Path:
    """The variant's prompt file, trained now (or further) if it is not there."""
    out = args.work / "pretrained" / variant
    file = out / "prompts.safetensors"
    if (out / "scores.json").is_file() and load_prompts(file, backbone):
        return Path(file)
    cards = [load_card(task) for task in args.upstream_tasks]
    pretrain(cards, backbone, pretrain_config(args, variant), out, data=args.upstream, log=_say)
    return Path(file)


def upstream_scores(work: Path) -> dict[str, Any]:
    """Mean dev score before and after pre-training of each variant, and every task's after it."""
    found = {}
    for variant in VARIANTS:
        folder = work / "pretrained" / variant
        if (folder / "scores.json").is_file():
            scores = json.loads((folder / "scores.json").read_text())
            result = json.loads((folder / "result.json").read_text())
            means = {k: sum(s[k] for s in scores.values()) / len(scores) for k in ("before", "after")}
            found[variant] = {
                **{k: round(100 * v, 1) for k, v in means.items()},
                "prompts_sha256": result["prompts_sha256"],
                "by_task": {task: round(100 * s["after"], 1) for task, s in scores.items()},
            }
    return found


def compute(args: argparse.Namespace) -> None:
    """Pre-train what is missing, then run the cells that are missing, for at most ``--minutes``."""
    end = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    for method in args.methods:
        if method not in METHODS:
            raise UnknownNameError("method", method, METHODS)
    backbone = load_backbone(args.backbone)
    settings = Settings(
        backbone=args.backbone,
        prompts=tuple(VARIANTS),
        iters=args.iters,
        epochs=args.epochs,
        test_limit=args.test_limit,
        max_tokens=args.max_tokens,
    )
    shared = asdict(settings) | {"pretraining": asdict(pretrain_config(args, "prefix"))}
    # all prompts follow from these and the backbone
    shared |= {"upstream_tasks": list(args.upstream_tasks), "weights": {"backbone": backbone.sha256}}
    claim_folder(args.work, shared)
    files = []
    for variant in needed(args.methods):
        files.append(str(pretrained(args, variant, backbone)))
        if time.monotonic() > end:
            return
    lab = Lab(replace(settings, prompts=tuple(files)), args.data, args.work)
    where_from = provenance()
    for seed in args.seeds:
        for task in args.tasks:
            for method in args.methods:
                cell = Cell(method, task, seed)
                if cell_file(args.work, cell).exists():
                    continue
                if time.monotonic() > end:
                    return
                work_through(lab, [cell], where_from, _say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@one_line_errors(goes_on=True)
def main() -> None:
    """Compute what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--upstream", type=Path, required=True, help="folder of upstream tasks")
    parser.add_argument("--data", type=Path, required=True, help="folder of downstream tasks")
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--upstream-tasks", nargs="+", default=list(UPSTREAM))
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--intrinsic-dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400, help="of each pre-training")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", default=list(ABLATED), help=", ".join(METHODS))
    parser.add_argument("--iters", type=int, default=200, help="of black-box methods")
    parser.add_argument("--epochs", type=int, default=100, help="of gradient tuning (paper: 1000)")
    parser.add_argument("--test-limit", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.json")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so many")
    parser.add_argument("--table", action="store_true", help="compute nothing: print what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.table:
        with sigterm_exits(), one_blas_thread():
            compute(args)
    print(write_results(args.work, args.out))
    scores = upstream_scores(args.work)
    write_json(args.out, {**json.loads(args.out.read_text()), "pretrained": scores})
    for variant, found in scores.items():
        print(f"- pre-trained, {variant}: mean upstream dev {found['before']} -> {found['after']}")


if __name__ == "__main__":
    main()

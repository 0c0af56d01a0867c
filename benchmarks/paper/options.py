"""What all tables and figures are asked: data, backbone, prompts, budget, and where cells are computed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Cell, claim_folder, work_together, work_with_ray
from benchmarks.paper.methods import METHODS, Lab, Settings
from benchmarks.provenance import RESULTS, provenance
from mp2.errors import UnknownNameError, UsageError

SEEDS = (8, 13, 21, 42, 100)


def parser_of(name: str, about: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options that every table and figure of cells has; ``defaults`` are its own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.paper {name}",
        description=about,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of downstream tasks")
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--prompts", nargs="*", default=["mini-deep", "mini-shallow"], help="files, names")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--methods", nargs="+", help=", ".join(METHODS))
    parser.add_argument("--iters", type=int, default=200, help="of black-box tuning (paper: 8000)")
    parser.add_argument("--epochs", type=int, default=100, help="of gradient tuning (paper: 1000)")
    parser.add_argument("--test-limit", type=int, default=300, help="test examples scored, all methods alike")
    parser.add_argument("--max-tokens", type=int, default=128, help="as long as mini was trained on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", help="what the engine computes in")
    parser.add_argument(
        "--training-precision", default="fp32", help="of gradient tuning: fp32, bf16 (autocast)"
    )
    parser.add_argument("--work", type=Path, default=Path("runs") / name, help="folder of the cells")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--jobs", type=int, default=1, help="processes; one a core")
    parser.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster; local: one on this machine")
    parser.add_argument("--table", action="store_true", help="compute nothing: print what is there")
    parser.set_defaults(**defaults)
    return parser


def seeds_of(text: str) -> list[int]:
    """The numbers of ``--seeds``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds is '{text}', expected whole numbers with commas") from None


def settings_of(args: argparse.Namespace, prompts: Sequence[str] | None = None) -> Settings:
    """What all cells of a folder share; ``prompts`` in the place of ``--prompts``."""
    return Settings(
        backbone=args.backbone,
        prompts=tuple(args.prompts if prompts is None else prompts),
        iters=args.iters,
        epochs=args.epochs,
        test_limit=args.test_limit,
        max_tokens=args.max_tokens,
        device=args.device,
        precision=args.precision,
        training_precision=args.training_precision,
    )


def compute(args: argparse.Namespace, lab: Lab, cells: Sequence[Cell]) -> None:
    """Compute what is missing of ``cells``; claims the lab's work folder for its settings and weights."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    for method in methods:
        if method not in METHODS:
            raise UnknownNameError("method", method, METHODS)
    if args.ray and args.jobs > 1:
        raise UsageError("--jobs are processes of this machine, and --ray has its own: drop one of them")
    lab.check(methods)
    shared = asdict(lab.settings)
    if shared["training_precision"] == "fp32":  # folders of before there was a choice do not name it
        del shared["training_precision"]
    claim_folder(lab.work, {**shared, "weights": lab.identity()})
    if args.ray:
        work_with_ray(lab, cells, provenance(), args.ray, say)
    else:
        work_together(lab, cells, provenance(), args.jobs, say)


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)

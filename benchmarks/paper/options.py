"""What all tables and figures are asked: data, backbone, prompts, budget, and where cells are computed."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.paper import cost
from benchmarks.paper.cells import Cell, claim_folder, work_together, work_with_ray
from benchmarks.paper.methods import METHODS, Lab, Settings
from benchmarks.paper.state import say, scale_of
from benchmarks.provenance import RESULTS, provenance
from mp2.errors import UnknownNameError, UsageError
from mp2.files import write_json
from mp2.tasks import load_card

SEEDS = (8, 13, 21, 42, 100)


class _Names(argparse.Action):
    """Names as words of their own or, as everywhere in ``mp2``, with commas between them."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        """Set the option to the list of names."""
        setattr(namespace, self.dest, [name for word in values for name in word.split(",") if name])


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
    parser.add_argument("--tasks", nargs="+", action=_Names, help="separated by spaces or commas")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--methods", nargs="+", action=_Names, help=", ".join(METHODS))
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
    parser.add_argument(
        "--budget-minutes",
        type=float,
        help="begin no cell that would end later",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="compute nothing: time short runs, print what all would cost"
    )
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


def choose(
    args: argparse.Namespace, tasks: Sequence[str], methods: Sequence[str], lab: Lab | None
) -> list[str]:
    """Set ``args.tasks`` and ``args.methods`` where none were given: the default's that can be had.

    Returns lines that say what cannot: tasks without data, methods without prompts. ``lab`` None: nothing
    will be computed, and all stay.
    """
    if lab is None:
        args.tasks, args.methods = args.tasks or list(tasks), args.methods or list(methods)
        return []
    notes = choose_tasks(args, tasks)
    if args.methods is None:
        lacking = lab.lacking(methods)
        args.methods = [m for m in methods if not any(m in own for own in lacking.values())]
        if not args.methods:
            kinds = " or ".join(lacking)
            raise UsageError(f"none of {', '.join(methods)} can be run: name {kinds} prompts in --prompts")
        for kind, own in lacking.items():
            notes.append(f"Without {', '.join(own)}: --prompts has no {kind} prompts.")
            say(notes[-1])
    return notes


def choose_tasks(args: argparse.Namespace, tasks: Sequence[str]) -> list[str]:
    """Set ``args.tasks``, where none were given, to those of ``tasks`` that ``--data`` has; see `choose`."""
    if args.tasks is not None:
        return []
    args.tasks = [task for task in tasks if (args.data / task).is_dir()]
    if not args.tasks:
        raise UsageError(f"--data {args.data} has no folder of {', '.join(tasks)}")
    absent = [task for task in tasks if task not in args.tasks]
    notes = [f"Without {', '.join(absent)}: --data has no folder of that name."] if absent else []
    for line in notes:
        say(line)
    return notes


def compute(args: argparse.Namespace, lab: Lab, cells: Sequence[Cell], until: float = math.inf) -> None:
    """Compute what is missing of ``cells``; claims the lab's work folder for its settings and weights.

    ``until``: see `deadline`. With ``--dry-run`` only print what they would cost.
    """
    methods = list(dict.fromkeys(cell.method for cell in cells))
    for method in methods:
        if method not in METHODS:
            raise UnknownNameError("method", method, METHODS)
    for task in dict.fromkeys(cell.task for cell in cells):
        load_card(task)  # a wrong name is said before anything is computed
    if args.ray and args.jobs > 1:
        raise UsageError("--jobs are processes of this machine, and --ray has its own: drop one of them")
    lab.check(methods)
    if args.dry_run:
        _print_cost(args, lab, cells)
        return
    shared = asdict(lab.settings)
    for name, default in (("training_precision", "fp32"), ("dev_every", None)):
        if shared[name] == default:  # folders of before there was a choice do not name it
            del shared[name]
    claim_folder(lab.work, {**shared, "weights": lab.identity()})
    if args.ray:
        work_with_ray(lab, cells, provenance(), args.ray, say, until)
    else:
        work_together(lab, cells, provenance(), args.jobs, say, until)


def _print_cost(args: argparse.Namespace, lab: Lab, cells: Sequence[Cell]) -> None:
    """Print the table of costs and write it beside ``--out``, as ``NAME_cost.json``."""
    rows, settings = cost.cost_rows(lab, cells, say), asdict(lab.settings)
    settings |= {"backbone": Path(args.backbone).name, "prompts": [Path(p).name for p in args.prompts]}
    found = {"provenance": provenance(), "settings": settings, "rows": rows}
    part = "" if lab.work == args.work else f"_{lab.work.name}"  # of a table of several folders
    write_json(args.out.with_name(f"{args.out.stem}{part}_cost.json"), found, indent=1)
    print(scale_of(settings, seeds_of(args.seeds)), "", cost.table(rows), sep="\n")


def deadline(args: argparse.Namespace) -> float:
    """When the command shall have ended, by `time.monotonic`: ``--budget-minutes`` from now on."""
    if args.budget_minutes is None:
        return math.inf
    if not args.budget_minutes > 0:
        raise UsageError(f"--budget-minutes is {args.budget_minutes:g}, expected minutes above 0")
    return time.monotonic() + 60 * float(args.budget_minutes)

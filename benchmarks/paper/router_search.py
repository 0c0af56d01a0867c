"""Stage I compared: final train loss and dev score of router searches at equal budget, on the real model.

Every method gets 100 and 200 evaluations of the few-shot training loss, the untuned router (every module
on) the first of them, on the same problems: a task, a seed, deep (4 layers of 8 modules in ``mini``) or
shallow (8 modules). A router's loss is computed once and shared by all methods, but every time that a method
asks for it counts as an evaluation of its budget. A second table has the cost of suggestions at 192
dimensions (CPT-large, deep) on a synthetic function of bits.

    python -m benchmarks.paper.router_search --data DIR [--task NAME ...] [--seed N ...] [--minutes 3]

DIR has the task folders, or ``upstream`` and ``downstream`` with them. All that is computed is kept in
``--work`` and found again by the hash of weights, prompts and data (a method's results also by that of its
code), so that the command can be stopped, at any moment or by ``--minutes``, and started again until it
prints the tables and writes ``benchmarks/results/router_search.json``; ``--table`` makes both of what is
there. Asked for a part of the problems, it writes JSON only under a name of its own (``--name``). Tasks with
short text, 30 to 32 examples: tnews, with 15 labels, has 2 a label here. ``bo`` gets 100 evaluations on the
first seed of each task: it takes longer than everything else together.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import one_line_errors
from benchmarks.paper.router_tables import cost_table, quality_table, task_table
from benchmarks.provenance import save
from mp2.errors import UsageError
from mp2.optimizers import create_router_search
from mp2.optimizers.two_stage import Space
from mp2.runs import BbtConfig, RouterConfig
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.frozen_model import FrozenModel, load_model, resolve_paths
from mp2.tasks import load_card

NEVERGRAD = ("NGOpt", "DiscreteOnePlusOne", "PortfolioDiscreteOnePlusOne", "FastGADiscreteOnePlusOne")
METHODS = ("bits", *(f"nevergrad:{n}" for n in NEVERGRAD), "random", "bo")
BUDGETS = (100, 200)
SOURCES = {  # a method's code, below mp2/optimizers: its results are of that code only
    "bits": ("router_bits.py", "router_model.py"),
    "bo": ("router_bayes.py",),
    "nevergrad": ("router_nevergrad.py",),
    "random": (),
}
TASKS: dict[str, int | None] = {"lcqmc": None, "bq": None, "chnsent": None, "tnews": 2}  # shots a label
SEEDS = (8, 13, 21)
LARGE = (24, 8)  # layers and modules of CPT-large


class Problem:
    """The few-shot loss of routers, each computed once ever; a file keeps them."""

    def __init__(self, config: BbtConfig, model: FrozenModel, folder: Path) -> None:
        self._problem = FewShotProblem(config, load_card(config.task), model)
        self.space = model.space()
        self.shape = (self.space.n_layers, self.space.n_modules)
        names = (self._problem.data_sha256, model.prompts.sha256, model.backbone.sha256)
        key = "-".join((self._problem.card.task, model.kind, str(config.seed), *(n[:8] for n in names)))
        self.file = folder / f"{key}.jsonl"
        self._losses: dict[str, float] = {}
        self.cells: dict[str, dict[str, Any]] = {}
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            try:
                values = json.loads(line)
            except json.JSONDecodeError:  # cut off when the command was killed
                continue
            self._losses.update(values.get("losses", {}))
            self.cells.update(values.get("cells", {}))

    def __call__(self, routers: np.ndarray) -> np.ndarray:
        """Losses [P] of routers [P, L', K]."""
        keys = [np.packbits(r.reshape(-1)).tobytes().hex() for r in routers]
        new = {k: i for i, k in enumerate(keys) if k not in self._losses}
        if new:
            found = self._problem.objective.router_losses(routers[list(new.values())]).fetch()
            losses = dict(zip(new, map(float, found), strict=True))
            self._losses.update(losses)
            self._keep({"losses": losses})
        return np.array([self._losses[k] for k in keys])

    def keep_cell(self, key: str, values: dict[str, Any]) -> None:
        """Remember what a method found."""
        self.cells[key] = values
        self._keep({"cells": {key: values}})

    def dev(self, router: np.ndarray) -> dict[str, float]:
        """Dev score and loss of a router [L', K]."""
        scores = self._problem.dev_scores(self.space.fuse(router)).fetch()
        return {"dev_score": scores.score, "dev_loss": scores.loss}

    def _keep(self, values: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write("\n" + json.dumps(values) + "\n")


def code_of(method: str) -> str:
    """Hash of the method's source files."""
    folder = Path(inspect.getfile(create_router_search)).parent
    names = ("router_search.py",) if method == "random" else SOURCES[method.partition(":")[0]]
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()[:8]


def search(
    method: str,
    space: Space,
    iterations: int,
    losses_of: Callable[[np.ndarray], np.ndarray],
    seed: int,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Routers [n, L', K] in the order they were met, their losses [n], CPU seconds of the method itself."""
    shape = (space.n_layers, space.n_modules)
    started = time.process_time()
    rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(2)[0])
    found = create_router_search(method, shape, iterations, space.warm, rng, space.modules())
    spent = time.process_time() - started
    routers = [np.ones((1, *shape), dtype=bool)]
    losses = [losses_of(routers[0])]
    while (left := iterations - sum(map(len, losses))) > 0:
        started = time.process_time()
        found.tell(routers[-1], losses[-1])
        asked = found.ask(left)
        spent += time.process_time() - started
        if not len(asked):
            break
        routers.append(asked)
        losses.append(losses_of(asked))
    return np.concatenate(routers), np.concatenate(losses), spent


def cell_key(method: str, budget: int) -> str:
    """What a result is kept under."""
    return f"{method} {budget} {code_of(method)}"


def run_cells(problem: Problem, seed: int, methods: list[str], over: Callable[[], bool]) -> bool:
    """Run what is missing; false if the time was over before that."""
    for method in methods:
        for budget in BUDGETS[: 1 if method == "bo" else None]:
            if cell_key(method, budget) in problem.cells:
                continue
            if over():
                return False
            routers, losses, spent = search(method, problem.space, budget, problem, seed)
            best = int(np.argmin(losses))
            values = {"loss": float(losses[best]), "seconds": spent, "asked": len(losses)}
            problem.keep_cell(cell_key(method, budget), values | problem.dev(routers[best]))
    return True


def run_exhaustive(problem: Problem) -> None:
    """The best of all routers, where there are few."""
    if "exhaustive" not in problem.cells:
        codes = (np.arange(256)[:, None] >> np.arange(8)) & 1
        routers = codes.astype(bool).reshape(256, *problem.shape)
        losses = np.concatenate([problem(routers[i : i + 20]) for i in range(0, 256, 20)])
        best = int(np.argmin(losses))
        problem.keep_cell("exhaustive", {"loss": float(losses[best])} | problem.dev(routers[best]))


def suggestion_cost(method: str) -> dict[str, Any]:
    """CPU seconds of 100 suggestions at 192 bits; of ``bo`` from one at each of a few histories."""
    rng = np.random.default_rng(0)
    hidden, weights = rng.random(LARGE) < 0.5, rng.gamma(1.0, 1.0, LARGE)
    modules = rng.normal(size=(*LARGE, 300)).astype(np.float32)
    iterations = BUDGETS[0]
    space = Space(
        kind="deep",
        n_layers=LARGE[0],
        n_modules=LARGE[1],
        n_dims=modules.shape[-1],
        fuse=lambda router: np.einsum("lk,lkd->ld", router.astype(np.float32), modules) / LARGE[1],
        warm=rng.random((20, *LARGE)) < 0.5,
    )

    def losses_of(routers: np.ndarray) -> np.ndarray:
        return np.asarray(((routers != hidden) * weights).mean((1, 2)))

    if method != "bo":
        search(method, space, 2, losses_of, 0)  # imports
        _, losses, spent = search(method, space, iterations, losses_of, 0)
        return {"method": method, "seconds": spent, "each": spent / (iterations - 1), "loss": losses.min()}
    points, each = (20, 60, 100), []
    for n in points:
        found = create_router_search("bo", LARGE, iterations, space.warm, np.random.default_rng(0))
        routers = np.asarray(rng.random((n, *LARGE)) < 0.5)
        found.ask(20)
        found.tell(routers, losses_of(routers))
        started = time.process_time()
        found.ask(1)
        each.append(time.process_time() - started)
    total = float(np.interp(np.arange(20, iterations), points, each).sum())
    return {
        "method": method,
        "seconds": total,
        "each": total / (iterations - 20),
        "note": f"interpolated from one suggestion at each of {', '.join(map(str, points))} points",
    }


def find_data(root: Path, task: str) -> Path:
    """The folder that holds the task's."""
    for folder in (root, root / "downstream", root / "upstream"):
        if (folder / task / "train.jsonl").is_file():
            return folder
    raise UsageError(f"there is no {task}/train.jsonl in {root}, nor in downstream or upstream there")


@one_line_errors(goes_on=True)
def main() -> None:
    """Run what is missing; with everything there, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", nargs="+", default=list(TASKS))
    parser.add_argument("--seed", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--method", nargs="+", default=list(METHODS))
    parser.add_argument("--kind", nargs="+", default=["shallow", "deep"])
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--prompts", help="deep prompts; shallow ones have a run of their own (--kind)")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after these; start again to go on")
    parser.add_argument("--table", action="store_true", help="run nothing; tables and JSON of what is there")
    parser.add_argument("--work", type=Path, default=Path("runs/router_search"))
    parser.add_argument("--name", help="of the JSON; router_search, and none where a part is asked for")
    args = parser.parse_args()
    asked = ("task", "seed", "method", "kind", "backbone", "prompts", "max_tokens")
    in_part = any(getattr(args, name) != parser.get_default(name) for name in asked)
    name = args.name or ("" if in_part else "router_search")
    args.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def over() -> bool:
        return args.table or time.monotonic() - started > 60 * args.minutes

    rows: list[dict[str, Any]] = []
    complete = True
    models: dict[str, FrozenModel] = {}
    for seed, task, kind in itertools.product(args.seed, args.task, args.kind):
        config = resolve_paths(
            BbtConfig(
                task=task,
                data=str(find_data(args.data, task)),
                backbone=args.backbone,
                prompts=args.prompts,
                head="span",
                kind=kind,
                router=RouterConfig(),
                seed=seed,
                shots=TASKS.get(task),
                max_tokens=args.max_tokens,
                threads=1,
            )
        )
        models[kind] = models.get(kind) or load_model(config)
        problem = Problem(config, models[kind], args.work)
        if kind == "shallow" and not over():
            run_exhaustive(problem)
        methods = [m for m in args.method if m != "bo" or seed == args.seed[0]]
        complete = run_cells(problem, seed, methods, over) and complete
        wanted = {cell_key(m, budget): f"{m} {budget}" for m in methods for budget in BUDGETS}
        wanted["exhaustive"] = "exhaustive"
        rows += [
            {"kind": kind, "task": task, "seed": seed, "cell": wanted[cell], **values}
            for cell, values in problem.cells.items()
            if cell in wanted
        ]
    if not complete and not args.table:
        raise SystemExit(f"time is over with {len(rows)} cells done; start the command again to go on")
    costs = [suggestion_cost(method) for method in args.method]
    print(quality_table(rows))
    print(task_table(rows))
    print(cost_table(costs))
    if name:
        print("written:", save(name, [{"cells": rows, "suggestion_cost_192": costs}]))
    else:
        print("not written: a part of all problems (--name writes it)")


if __name__ == "__main__":
    main()

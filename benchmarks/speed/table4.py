"""Table 4 of the paper: minutes of the two stages of black-box tuning, at the shape of CPT-large.

The paper (Sun et al., ACL 2023, Table 4; "training time (in minutes)", an NVIDIA RTX 3090, appendix
A.2) against mp2, a plain PyTorch loop (``benchmarks/speed/plain_loop.py``) and, for deep prompts, what a good
engineer would write (``benchmarks/speed/rivals.py``: A, B, C), all on this machine, in this run. Weights are
random (24 layers, 1024 wide, 16 heads, the vocabulary's size of CPT); time does not depend on their values.

What the paper's deep minutes stand for: stage II minutes divided by 7,800 iterations (shallow: 8,000 less
200) and by 2,880 (deep) give the same milliseconds an evaluation, task by task, and 2,880 evaluations are
what the published code does by default for deep prompts (6 generations of 20 in each of 24 layers). So deep
two-stage minutes are given twice: with the published 2,880 evaluations in stage II, and with the 7,900 that
the paper's text states. Compare milliseconds an evaluation first.

Every cell is *measured* (the run was done, whole) where it fits the time left for it, and otherwise
*extrapolated*: forwards of the few-shot objective at 1 and 6 layers, on the line through them to all layers,
times their number. Measured minutes include suggestions, CMA-ES and dev evaluations, extrapolated ones dev
evaluations only; neither has the test set. The plain loop is always extrapolated: from evaluations at 1 and 3
layers on at most 32 of the examples, padded to the longest of all.

The paper searches the router by Bayesian optimisation, ours by ``bits``: a row of its own has our forwards
with the suggestions of ``bo`` (``benchmarks/speed/suggestions.py``; ``--bo-minutes`` a kind, then
extrapolated; 0: those of the JSON that is there). ``--bo-only`` measures these alone and puts them into the
JSON.

    python -m benchmarks.paper table4 --data DIR [--budget-minutes 10] [--runtime torch] [--threads N]

DIR holds thucnews/, bq/, tnews/ and lcqmc/. Cells are kept in --work as they are done; started again, it goes
on with what is left. Needs 10 GB of memory. Two cores: 10 minutes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.command import one_line_errors
from benchmarks.provenance import RESULTS, provenance, save
from benchmarks.speed.engine_work import matrix_dtype
from benchmarks.speed.full_shape import HEADS, HIDDEN, POSITIONS, VOCAB, vocabulary
from benchmarks.speed.plain_loop import PlainLoop
from benchmarks.speed.rivals import RIVALS, Rival
from benchmarks.speed.suggestions import suggestion_cost
from benchmarks.speed.table4_render import KINDS, PAPER, PUBLISHED, STATED, TASKS, WHOSE, table
from mp2.backbone import Backbone, BackboneConfig, random_backbone
from mp2.engine import Objective, Scorer, create_backend
from mp2.errors import UsageError
from mp2.heads import SpanHead
from mp2.optimizers.router_search import stage_one_iterations
from mp2.prompts import PromptSet, random_prompts
from mp2.runs.config import BbtConfig
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.frozen_model import FrozenModel
from mp2.runs.plan import iterations_of
from mp2.runs.run import make_problem
from mp2.runs.series import start_run
from mp2.tasks import MrcInput, has_split, load_card

PLAIN_EXAMPLES, RIVAL_EXAMPLES = 32, 8
OUR_DEPTH = 6  # ours is timed at 1 and at so many layers; the others, which are slower, at 1 and 3
POPULATION = 5  # timed on a CPU; on a GPU the whole population
SEED = 42


def make_backbone(n_layers: int) -> Backbone:
    """CPT-large's shape with random weights."""
    config = BackboneConfig(
        name=f"random-cpt-large-{n_layers}",
        n_layers=n_layers,
        hidden=HIDDEN,
        n_heads=HEADS,
        ffn=4 * HIDDEN,
        vocab_size=VOCAB,
        max_positions=POSITIONS,
    )
    return random_backbone(config, vocabulary(), seed=0)


def first_layers(backbone: Backbone, prompts: PromptSet, n_layers: int) -> tuple[Backbone, PromptSet]:
    """The backbone's first ``n_layers`` layers and their prompts, sharing the weights."""
    config = replace(backbone.config, n_layers=n_layers)
    encoder = copy.copy(backbone.encoder)
    encoder.__dict__["_modules"] = dict(backbone.encoder._modules)
    encoder.config = config
    encoder.layers = torch.nn.ModuleList(list(backbone.encoder.layers)[:n_layers])
    cut = slice(n_layers) if prompts.kind == "deep" else slice(None)
    fewer = replace(
        prompts,
        meta=replace(prompts.meta, n_layers=n_layers),
        z=prompts.z[cut],
        projection=prompts.projection[cut],
        routers=prompts.routers[:, cut],
    )
    return replace(backbone, config=config, encoder=encoder), fewer


def extrapolate(seconds: dict[float, float], x: float) -> float:
    """Seconds at ``x`` from those at one or two places, along the line through them."""
    low, high = min(seconds), max(seconds)
    slope = max(0.0, seconds[high] - seconds[low]) / (high - low) if low < high else 0.0
    return seconds[high] + (x - high) * slope


def our_seconds(model: FrozenModel, problem: FewShotProblem) -> dict[str, float]:
    """Seconds of one evaluation in stage I and in stage II (mean of all layers), and of the dev set."""
    on_gpu, n_layers = str(model.backend.device).startswith("cuda"), model.backbone.config.n_layers
    p = problem.config.layers.popsize if on_gpu else POPULATION
    found: dict[str, dict[float, float]] = {"stage1": {}, "stage2": {}, "dev": {}}
    prompts = model.prompts
    z = prompts.z.mean(1).detach().cpu().numpy()
    routers = np.random.default_rng(0).random((p, *prompts.z.shape[:2])) < 0.5
    for depth in sorted({1, min(OUR_DEPTH, n_layers)}):
        head = SpanHead(prompts.span_weight, prompts.span_bias, depth)  # runs the layers below it
        forward = model.backend.forward(prompts, head)
        objective, scorer = Objective(forward, problem.train_inputs), Scorer(forward)
        n_searched = min(depth, len(z))

        def visits(objective: Objective = objective, n_searched: int = n_searched) -> None:
            objective.set_incumbent(z)
            for layer in range(n_searched):
                objective.layer_losses(layer, np.repeat(z[layer][None], p, 0)).fetch()

        runs = depth if len(z) == 1 else (depth + 1) / 2  # layers that a visit runs, in the mean
        found["stage1"][depth] = _steady(lambda o=objective: o.router_losses(routers).fetch()) / p
        found["stage2"][runs] = _steady(visits) / (p * n_searched)
        found["dev"][depth] = _steady(lambda s=scorer: s.outputs(z, problem.dev_inputs).fetch())
    at = {"stage1": n_layers, "stage2": n_layers if len(z) == 1 else (n_layers + 1) / 2, "dev": n_layers}
    return {name: extrapolate(seconds, at[name]) for name, seconds in found.items()}


def _steady(work: Callable[[], object]) -> float:
    """Seconds of ``work`` once it has been done before; its results are on the host when it returns."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def others_seconds(
    model: FrozenModel, train: Sequence[MrcInput], rivals: bool
) -> dict[str, dict[str, float]]:
    """Seconds of one evaluation in stages I and II of the plain loop and, with ``rivals``, of A, B and C.

    Extrapolated over layers and examples. They compute as the engine does on a GPU, on a CPU in float32.
    """
    device, n_layers = str(model.backend.device), model.backbone.config.n_layers
    dtype = matrix_dtype(device, model.backend.precision)
    names = ("plain", *RIVALS) if rivals else ("plain",)
    measured: dict[str, dict[float, float]] = {name: {} for name in names}
    for depth in sorted({1, min(3, n_layers)}):
        body, prompts = first_layers(model.backbone, model.prompts, depth)
        turns = {"plain": plain_work(body, prompts, spaced(train, PLAIN_EXAMPLES), device, dtype)}
        if rivals:
            turns |= rivals_work(body, prompts, spaced(train, RIVAL_EXAMPLES), device, dtype)
        times: dict[str, list[float]] = {name: [] for name in turns}
        for number in range(3):  # the first is left out: it allocates
            for name in reversed(turns) if number == 2 else turns:
                started = time.perf_counter()
                n_evaluations = turns[name]()
                times[name].append((time.perf_counter() - started) / n_evaluations)
        for name, found in times.items():
            layers = (depth + 1) / 2 if name == "C" else depth  # that an evaluation runs, in the mean
            measured[name][layers] = min(found[1:])
    n = len(train)
    parts = {name: min(n, PLAIN_EXAMPLES if name == "plain" else RIVAL_EXAMPLES) for name in names}
    seconds = {
        name: extrapolate(found, (n_layers + 1) / 2 if name == "C" else n_layers) * n / parts[name]
        for name, found in measured.items()
    }
    return {
        name: {"stage1": seconds["B" if name == "C" else name], "stage2": seconds[name]} for name in names
    }


def spaced(train: Sequence[MrcInput], most: int) -> list[MrcInput]:
    """At most so many of ``train``, evenly from the longest on."""
    by_length = sorted(train, key=lambda x: x.n_tokens)
    step = max(1.0, len(train) / most)
    return [by_length[-1 - int(k * step)] for k in range(min(most, len(train)))]


def plain_work(
    body: Backbone, prompts: PromptSet, inputs: Sequence[MrcInput], device: str, dtype: torch.dtype
) -> Callable[[], int]:
    """What evaluates a candidate by the plain loop, waits for it and returns how many evaluations it was."""
    loop = PlainLoop(body, prompts, inputs, device, dtype)
    z = np.random.default_rng(0).standard_normal((prompts.z.shape[0], prompts.z.shape[-1])).astype(np.float32)

    def work() -> int:
        loop.loss(z)
        return 1

    return work


def rivals_work(
    body: Backbone, prompts: PromptSet, inputs: Sequence[MrcInput], device: str, dtype: torch.dtype
) -> dict[str, Callable[[], int]]:
    """The same of A (one candidate), B (a population) and C (a population at each layer in turn)."""
    n_layers = len(prompts.z)
    p = 20 if device != "cpu" else POPULATION
    z = np.random.default_rng(0).standard_normal((n_layers, p, prompts.z.shape[-1])).astype(np.float32)
    found: dict[str, Callable[[], int]] = {}
    first: Rival | None = None
    for kind in RIVALS:
        rival = Rival(kind, body, prompts, inputs, device, dtype, like=first)
        first = first or rival
        visited = range(n_layers) if kind == "C" else range(1)  # the cost of A and B is the same at each
        n = 1 if kind == "A" else p

        def work(rival: Rival = rival, visited: range = visited, n: int = n) -> int:
            rival.set_incumbent(z[:, 0])
            for layer in visited:
                rival.layer_losses(layer, z[layer, :n])
            return n * len(visited)

        found[kind] = work
    return found


def run_cell(
    model: FrozenModel, config: BbtConfig, budget_s: float, *, rivals: bool = True
) -> dict[str, Any]:
    """One task and kind: predicted, run where that fits ``budget_s``; plain loop and ``rivals`` beside it."""
    started = time.perf_counter()
    problem = make_problem(config, model)
    lengths = [x.n_tokens for x in problem.train_inputs]
    device = str(model.backend.device)
    others = others_seconds(model, problem.train_inputs, rivals and model.kind == "deep")
    stage1, stage2 = iterations_of(problem)
    seconds = our_seconds(model, problem)
    round_iters = (model.space().n_layers if model.kind == "deep" else 5) * config.layers.popsize
    dev_s = seconds["dev"] * -(-stage2 // round_iters)
    stages_s = (stage1 * seconds["stage1"] + 2 * seconds["dev"], stage2 * seconds["stage2"])
    predicted_s = sum(stages_s) + dev_s
    ours = _ours("extrapolated", model.kind, *stages_s, dev_s, stage2)
    ours |= {"stage1_evaluation_ms": round(1e3 * seconds["stage1"], 3)}
    if predicted_s < budget_s - (time.perf_counter() - started):
        del problem
        ours = measured(model, config, stage1, stage2)
    gc.collect()
    return {
        "task": config.task,
        "kind": model.kind,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "runtime": model.backend.name,
        "precision": model.backend.precision,
        "reason": model.backend.reason,
        "n_layers": model.backbone.config.n_layers,
        "n_examples": len(lengths),
        "mean_tokens": round(float(np.mean(lengths)), 1),
        "max_tokens": max(lengths),
        "iterations": [stage1, stage2],
        "ours": ours,
        **{name: _others(model.kind, stage1, spent) for name, spent in others.items()},
        "paper": paper(model.kind, config.task),
        "predicted_s": round(predicted_s, 2),
        "spent_s": round(time.perf_counter() - started, 1),
    }


def measured(model: FrozenModel, config: BbtConfig, stage1: int, stage2: int) -> dict[str, Any]:
    """The same from a whole run."""
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = start_run(config, Path(folder), model=model)
        wall = time.perf_counter() - start
    s = result["seconds"]
    return _ours("measured", model.kind, s["stage1"], s["stage2"], s["dev"], stage2) | {
        "suggest_s": round(s["suggest"], 2),
        "stage1_evaluation_ms": round(1e3 * s["stage1"] / stage1, 3),
        "wall_s": round(wall, 2),
    }


def _ours(how: str, kind: str, stage1_s: float, stage2_s: float, dev_s: float, stage2: int) -> dict[str, Any]:
    share = PUBLISHED[kind] / stage2
    return {
        "how": how,
        "stage1_minutes": round(stage1_s / 60, 3),
        "two_stage_minutes": round((stage1_s + share * (stage2_s + dev_s)) / 60, 3),
        "stated_minutes": round((stage1_s + stage2_s + dev_s) / 60, 3),
        "evaluation_ms": round(1e3 * stage2_s / stage2, 3),
    }


def _others(kind: str, stage1: int, seconds: dict[str, float]) -> dict[str, Any]:
    minutes = {
        name: count * seconds["stage2"] / 60
        for name, count in (("two_stage", PUBLISHED[kind]), ("stated", STATED[kind]))
    }
    stage1_minutes = stage1 * seconds["stage1"] / 60
    return {
        "how": "extrapolated",
        "evaluation_ms": round(1e3 * seconds["stage2"], 2),
        "stage1_minutes": round(stage1_minutes, 3),
        "two_stage_minutes": round(stage1_minutes + minutes["two_stage"], 3),
        "stated_minutes": round(stage1_minutes + minutes["stated"], 3),
    }


def paper(kind: str, task: str) -> dict[str, Any]:
    """The paper's minutes and what they come to an evaluation; all layers' forwards, deep or shallow."""
    stage1, both = PAPER[kind][task]
    return {
        "stage1_minutes": stage1,
        "two_stage_minutes": both,
        "evaluation_ms": round((both - stage1) * 6e4 / PUBLISHED[kind], 1),
    }


def bo_row(kind: str, n_layers: int, iters: int, budget_s: float) -> dict[str, Any]:
    """What the paper's search of stage I takes beside the forwards; one row for all tasks of a kind."""
    shape = (n_layers if kind == "deep" else 1, 8)
    iterations = stage_one_iterations("bo", None, kind, shape, iters)
    return {"task": "bo", "kind": kind, **suggestion_cost("bo", shape, iterations, budget_s)}


def _only_bo(args: argparse.Namespace) -> None:
    path = RESULTS / f"{args.name}.json"
    found = json.loads(path.read_text("utf-8"))
    found["rows"] = [row for row in found["rows"] if row["task"] != "bo"]
    for kind in args.kind:
        row = bo_row(kind, args.layers, args.iters, 60 * args.bo_minutes)
        print(f"{kind:8} {row}", flush=True)
        found["rows"].append(row | {"provenance": provenance()})
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


@one_line_errors(goes_on=True)
def main() -> None:
    """Do what is left of the cells, print the table, write the JSON."""
    run()


def run(words: Sequence[str] | None = None) -> None:
    """See `main`; ``words`` are the command's (None: what was typed)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MP2_DATA"))
    parser.add_argument("--task", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--kind", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--runtime", default="torch")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--engine", type=Path, help="engine folder, for runtimes that need one")
    parser.add_argument("--budget-minutes", type=float, default=10.0)
    parser.add_argument("--bo-minutes", type=float, default=2.0)
    parser.add_argument(
        "--rivals", action=argparse.BooleanOptionalAction, default=True, help="A, B and C as well"
    )
    parser.add_argument("--bo-only", action="store_true", help="only the suggestions, into the JSON there is")
    parser.add_argument("--iters", type=int, default=8000)
    parser.add_argument("--work", type=Path, default=Path("runs/table4"), help="cells that are done")
    parser.add_argument("--name", default="table4", help="of the JSON in benchmarks/results")
    args = parser.parse_args(words)
    if args.bo_only:
        _only_bo(args)
        return
    if args.data is None:
        parser.error("the four tasks are needed: give --data DIR or set MP2_DATA")
    settings = {
        key: str(getattr(args, key))
        for key in (
            "layers",
            "runtime",
            "device",
            "precision",
            "threads",
            "iters",
            "budget_minutes",
            "rivals",
        )
    }
    for task in args.task:  # said now, not when the backbone is there
        if not has_split(load_card(task), "train", args.data):
            raise UsageError(f"--data {args.data} has no training examples of {task}")
    tag = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    args.work.mkdir(parents=True, exist_ok=True)
    files = {(k, t): args.work / f"{tag}-{k}-{t}.json" for k in args.kind for t in args.task}
    todo = [key for key, file in files.items() if not file.is_file()]
    end = time.perf_counter() + 60 * args.budget_minutes
    if todo:
        backbone = make_backbone(args.layers)
        runtime = create_backend(
            args.runtime,
            backbone,
            engine_dir=args.engine,
            device=args.device,
            threads=args.threads,
            precision=args.precision,
        )
    bo_files = {kind: args.work / f"{tag}-{kind}-bo.json" for kind in args.kind}
    if not args.bo_minutes:
        bo_files.clear()
    for kind, file in bo_files.items():
        if not file.is_file():
            row = bo_row(kind, args.layers, args.iters, 60 * args.bo_minutes) | {"provenance": provenance()}
            file.write_text(json.dumps(row, ensure_ascii=False, indent=1) + "\n", "utf-8")
    for kind in args.kind:
        tasks = [task for k, task in todo if k == kind]
        if not tasks:
            continue
        prompts = random_prompts(backbone, kind, prompt_tokens=50, intrinsic_dim=300, seed=1)
        model = FrozenModel(backbone, prompts, runtime)
        for task in tasks:
            left = len(todo) - todo.index((kind, task))
            config = BbtConfig(
                task=task,
                data=str(args.data),
                backbone=backbone.name,
                prompts="random",
                head="span",
                kind=kind,
                iters=args.iters,
                seed=SEED,
                test=False,
                baselines=False,
                threads=args.threads,
            )
            cell = run_cell(model, config, max(1.0, (end - time.perf_counter()) / left), rivals=args.rivals)
            cell["provenance"] = provenance()
            files[kind, task].write_text(json.dumps(cell, ensure_ascii=False, indent=1) + "\n", "utf-8")
            ms = ", ".join(f"{whose} {cell[whose]['evaluation_ms']:.1f}" for whose in WHOSE if whose in cell)
            print(
                f"{kind:8} {task:9} ms an evaluation: {ms} ({cell['ours']['how']}, {cell['spent_s']:.0f} s)",
                flush=True,
            )
        del model, prompts
        gc.collect()
    cells = [json.loads(file.read_text("utf-8")) for file in (*files.values(), *bo_files.values())]
    if not args.bo_minutes:
        there = json.loads((RESULTS / f"{args.name}.json").read_text("utf-8"))["rows"]
        cells += [row for row in there if row["task"] == "bo" and row["kind"] in args.kind]
    print(table(cells))
    print("written:", save(args.name, cells))


if __name__ == "__main__":
    main()

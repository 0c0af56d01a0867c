"""The plan of a run before it starts: what runs it and why, in which batches, and how long it will take."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mp2.engine.batches import group_by_length, pieces
from mp2.engine.plan import Costs, LayerTimer, Prediction, Workload, measure, predict, target_tokens
from mp2.engine.select import create_objective, layer_seconds
from mp2.optimizers.cma_layers import LayerSearches
from mp2.optimizers.report import clock
from mp2.optimizers.router_search import create_router_search, stage_one_iterations
from mp2.optimizers.session import one_blas_thread

if TYPE_CHECKING:
    from mp2.optimizers.few_shot_problem import FewShotProblem

WORTH_S = 30.0  # a run that will surely be shorter gets no prediction
_SHARE = 0.02  # of a run's time that the prediction at its start may take
_BUDGETS_S = {"start": (0.2, 20.0), "explain": (2.0, 60.0)}  # at least, at most
_SUGGEST_LIMIT_S = 3.0
_GENERATIONS = 10
_PROBE_TOKENS = 512  # of layer_seconds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do."""

    task: str
    seed: int
    backbone: str
    kind: str
    iterations: tuple[int, int]  # stage I, stage II
    engine: dict[str, Any]
    training: dict[str, Any]
    work: Workload
    costs: Costs
    suggest_s: tuple[float, float]  # stage I and II: what the optimizers add to the forwards
    seconds: Prediction  # suggestions included

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        values = asdict(self)
        values["costs"]["full_s"] = {str(p): s for p, s in self.costs.full_s.items()}
        values["seconds"]["total_s"] = self.seconds.total_s
        return values


def plan_run(problem: FewShotProblem, purpose: str = "explain") -> Plan | None:
    """Time some layers and predict the run.

    For ``purpose`` "start" as quickly as is fair to the run's length, and None for a run too short to
    matter; for "explain" in up to a minute.
    """
    config, model = problem.config, problem.model
    runtime, space = model.runtime, model.space()
    shape = (space.n_layers, space.n_modules)
    stage1 = stage_one_iterations(
        config.router.method, config.router.iterations, space.kind, shape, config.iters
    )
    stage2 = 0 if config.router_only else config.iters - stage1
    popsize = config.layers.popsize
    train = problem.train_inputs
    lengths = [x.n_tokens for x in train]

    token_s = layer_seconds(runtime, model.backbone) / _PROBE_TOKENS
    n_layers = model.backbone.config.n_layers
    inline = model.prompts.meta.prompt_tokens if space.kind == "shallow" else 0
    tokens = (sum(lengths) + inline * len(train)) * (stage1 + (0.5 if space.kind == "deep" else 1) * stage2)
    rough_s = token_s * n_layers * tokens
    if purpose == "start" and rough_s < WORTH_S:
        return None

    least, most = _BUDGETS_S[purpose]
    budget = min(max(_SHARE * rough_s, least), most)
    populations, suggest1 = _stage_one(problem, stage1)
    sizes = Counter(populations)
    usual = max(sizes, key=lambda p: p * sizes[p])
    timer = LayerTimer(
        runtime,
        model.backbone,
        model.prompts,
        train,
        population=max(usual, popsize if stage2 else 1),
        target_tokens=target_tokens(budget, token_s),
        make_objective=create_objective,
    )
    costs = measure(
        timer,
        populations=[usual],
        popsize=popsize if stage2 else 0,
        dev=problem.dev_inputs,
        test=problem.test_inputs() if config.test else [],
    )
    round_iters = space.n_layers * popsize
    dev_every = config.dev_every or (round_iters if space.kind == "deep" else 100)
    work = Workload(
        populations=populations,
        layer_iterations=stage2,
        popsize=popsize,
        n_dev=2 + -(-stage2 // dev_every),
        n_test=0 if not config.test else 2 + (stage2 > 0),
    )
    forwards = predict(work, costs)
    suggest2 = _stage_two_waits(problem, costs, stage2) if stage2 else 0.0
    limit = problem.objective.micro_batch_tokens
    return Plan(
        task=problem.card.task,
        seed=config.seed,
        backbone=model.backbone.name,
        kind=space.kind,
        iterations=(stage1, stage2),
        engine=_engine(problem),
        training={
            "examples": len(train),
            "min_tokens": min(lengths),
            "mean_tokens": sum(lengths) / len(lengths),
            "max_tokens": max(lengths),
            **_batches(lengths, popsize if stage2 else usual, limit, inline),
        },
        work=work,
        costs=costs,
        suggest_s=(suggest1, suggest2),
        seconds=Prediction(
            prepare_s=forwards.prepare_s,
            stage1_s=forwards.stage1_s + suggest1,
            stage2_s=forwards.stage2_s + suggest2,
            dev_s=forwards.dev_s,
            test_s=forwards.test_s,
        ),
    )


def _engine(problem: FewShotProblem) -> dict[str, Any]:
    runtime = problem.model.runtime
    return {
        "runtime": runtime.name,
        "precision": runtime.precision,
        "device": str(runtime.device),
        "threads": problem.config.threads,
        "reason": runtime.reason,
    }


def _batches(lengths: list[int], population: int, limit: int, inline: int) -> dict[str, Any]:
    """How a population is cut up: groups of examples, batches, share of padding."""
    groups = group_by_length(lengths, population, limit)
    padded = sum(len(group) * lengths[group[0]] for group in groups)
    n_batches = sum(
        len(list(pieces(population, len(group), lengths[group[0]] + inline, limit))) for group in groups
    )
    return {
        "population": population,
        "groups": len(groups),
        "batches": n_batches,
        "batch_tokens": limit,
        "padding": 1 - sum(lengths) / padded,
    }


def _stage_one(problem: FewShotProblem, iterations: int) -> tuple[tuple[int, ...], float]:
    """Populations and seconds of the router search, tried on random losses."""
    config, space = problem.config, problem.model.space()
    shape = (space.n_layers, space.n_modules)
    rng = np.random.default_rng(0)
    with one_blas_thread():
        search = create_router_search(config.router.method, shape, iterations, space.warm, rng)
        search.tell(np.ones((1, *shape), dtype=bool), np.ones(1))
        sizes, done, spent = [1], 1, 0.0
        while done < iterations:
            start = time.perf_counter()
            routers = search.ask(iterations - done)
            if not len(routers):
                break
            search.tell(routers, rng.random(len(routers)))
            last = time.perf_counter() - start
            sizes.append(len(routers))
            done += len(routers)
            spent += last
            if spent > _SUGGEST_LIMIT_S and done < iterations:  # a slow method: the rest as the last
                rounds = -(-(iterations - done) // len(routers))
                sizes += [len(routers)] * rounds
                return tuple(sizes), spent + rounds * last
    return tuple(sizes), spent


def _stage_two_waits(problem: FewShotProblem, costs: Costs, iterations: int) -> float:
    """Seconds that CMA-ES adds to the forwards of stage II.

    With several layers its work runs beside forwards: on a GPU it costs nothing until it is longer than
    they are; on a CPU it takes its share of the cores. With one layer, forwards wait for it.
    """
    config, space = problem.config, problem.model.space()
    rng = np.random.default_rng(0)
    with one_blas_thread():
        sigma = config.layers.sigma(space.n_layers - 1, space.kind)
        searches = LayerSearches([sigma], space.n_dims, config.layers, np.random.SeedSequence(0))
        try:
            waits = []
            for _ in range(_GENERATIONS):
                offsets = searches.ask(0)
                waits.append(searches.waited_s)
                searches.tell(0, offsets, rng.random(len(offsets)))
        finally:
            searches.close()
    generation = float(np.mean(waits[1:]))
    visits = iterations / config.layers.popsize
    if space.n_layers == 1:
        return visits * generation
    if str(problem.model.runtime.device).startswith("cuda"):
        return visits * max(0.0, generation - float(np.mean(costs.visit_s)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return visits * generation / cores


def announce(problem: FewShotProblem) -> None:
    """Say on stderr what runs and why, and about how long it will take if that is long."""
    plan = plan_run(problem, "start")
    line = f"mp2: {engine_line(_engine(problem))}"
    print(line if plan is None else f"{line}; {plan_line(plan)}", file=sys.stderr, flush=True)


def plan_line(plan: Plan) -> str:
    """How long, in one line."""
    s = plan.seconds
    parts = [("stage I", s.stage1_s), ("stage II", s.stage2_s), ("dev", s.dev_s), ("test", s.test_s)]
    return f"about {clock(s.total_s)} (" + ", ".join(f"{name} {clock(t)}" for name, t in parts if t) + ")"


def engine_line(engine: dict[str, Any]) -> str:
    """What runs, and why."""
    threads = f", {engine['threads']} threads" if engine["device"] == "cpu" and engine["threads"] else ""
    return f"{engine['runtime']}, {engine['precision']}, {engine['device']}{threads} ({engine['reason']})"


def plan_table(plan: Plan, n_seeds: int = 1) -> str:
    """The plan for people."""
    training, costs, s = plan.training, plan.costs, plan.seconds
    stage1, stage2 = plan.iterations
    rows = [
        ("engine", engine_line(plan.engine)),
        (
            "training",
            f"{training['examples']} examples of {training['min_tokens']} to {training['max_tokens']} tokens "
            f"(mean {training['mean_tokens']:.0f}); {training['population']} candidates: "
            f"{training['groups']} groups by length, {training['batches']} batches of at most "
            f"{training['batch_tokens']} tokens, {100 * training['padding']:.0f}% padding",
        ),
        (
            "stage I",
            f"{clock(s.stage1_s)}  {stage1} iterations, {1e3 * s.stage1_s / stage1:.1f} ms each, "
            f"suggestions {plan.suggest_s[0]:.1f} s",
        ),
    ]
    if stage2:
        each = [1e3 * t / plan.work.popsize for t in costs.visit_s]
        layers = " ".join(f"{t:.1f}" for t in each)
        what = "ms an iteration, layer by layer" if len(each) > 1 else "ms an iteration"
        rows.append(
            (
                "stage II",
                f"{clock(s.stage2_s)}  {stage2} iterations, {1e3 * s.stage2_s / stage2:.1f} ms each, "
                f"CMA-ES {plan.suggest_s[1]:.1f} s; {what}: {layers}",
            )
        )
    rows.append(("dev", f"{clock(s.dev_s)}  at most {plan.work.n_dev} evaluations, {costs.dev_s:.2f} s each"))
    if plan.work.n_test:
        rows.append(
            ("test", f"{clock(s.test_s)}  at most {plan.work.n_test} evaluations, {costs.test_s:.2f} s each")
        )
    rows.append(("prepare", f"{clock(s.prepare_s)}  weights and projections, once"))
    rows.append(
        (
            "total",
            f"{clock(s.total_s)}  predicted in {costs.spent_s:.1f} s from {costs.n_timed_layers} of "
            f"{'all ' if costs.n_timed_layers == len(costs.visit_s) else ''}the layers and "
            f"{100 * costs.timed_share:.0f}% of the training tokens",
        )
    )
    if n_seeds > 1:
        rows.append(
            ("seeds", f"{clock(n_seeds * s.total_s)}  at most, for {n_seeds} seeds one after another")
        )
    width = max(len(name) for name, _ in rows)
    lines = [f"{plan.task}  {plan.kind}  seed {plan.seed}  backbone {plan.backbone}"]
    for name, text in rows:
        indent = " " * (width + 2)
        lines.append(textwrap.fill(text, 110, initial_indent=name.ljust(width + 2), subsequent_indent=indent))
    return "\n".join(lines)

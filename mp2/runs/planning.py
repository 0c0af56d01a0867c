"""The plan of a run before it starts: what runs it, in which batches, and how long each part will take."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mp2.engine.batches import group_by_length, pieces
from mp2.engine.cuda.launches import lanes_for
from mp2.engine.cuda.objective import CudaObjective
from mp2.engine.layer_timer import LayerTimer
from mp2.engine.plan import Costs, Prediction, Workload, measure, predict, target_tokens
from mp2.engine.probe import Probe, layer_seconds
from mp2.engine.select import create_objective
from mp2.limits import usable_cores
from mp2.optimizers.cma_layers import LayerSearches
from mp2.optimizers.router_search import create_router_search, stage_one_iterations
from mp2.runs.precision import precision_agreement
from mp2.runs.session import one_blas_thread
from mp2.runs.together import AT_ONCE

if TYPE_CHECKING:
    from mp2.engine.agreement import Agreement
    from mp2.runs.few_shot_problem import FewShotProblem

_SHARE = 0.02  # of a run's time that the prediction at its start may take
_BUDGETS_S = {"start": (0.2, 20.0), "explain": (4.0, 60.0)}  # at least, at most
_SUGGEST_LIMIT_S = 3.0
_GENERATIONS = 10


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
    lanes: int  # runs like this one that the device computes side by side; 1: their evaluations take turns
    seconds: Prediction  # suggestions included
    agreement: Agreement | None = None  # with float32, of a lower precision; not in the plan at a run's start

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        values = asdict(self)
        values["costs"]["full_s"] = {str(p): s for p, s in self.costs.full_s.items()}
        values["seconds"]["total_s"] = self.seconds.total_s
        values["precision_agreement"] = None if self.agreement is None else self.agreement.as_dict()
        del values["agreement"]
        return values


def plan_run(problem: FewShotProblem, budget_s: float | None = None) -> Plan:
    """Time some layers for about ``budget_s`` (None: 4 to 60 s, as the run is long) and predict the run."""
    token_s, rough_s = _rough(problem)
    plan = _plan(problem, token_s, budget_s or _budget(rough_s, "explain"))
    return replace(plan, agreement=precision_agreement(problem))


def plan_start(problem: FewShotProblem, worth_s: float) -> Plan | None:
    """Return a plan made in 0.2 to 20 s, or None for a run that surely takes less than ``worth_s``."""
    token_s, rough_s = _rough(problem)
    return None if rough_s < worth_s else _plan(problem, token_s, _budget(rough_s, "start"))


def engine_of(problem: FewShotProblem) -> dict[str, Any]:
    """What runs a problem, and why."""
    runtime = problem.model.runtime
    return {
        "runtime": runtime.name,
        "precision": runtime.precision,
        "device": str(runtime.device),
        "threads": problem.config.threads,
        "reason": runtime.reason,
    }


def _budget(rough_s: float, purpose: str) -> float:
    least, most = _BUDGETS_S[purpose]
    return min(max(_SHARE * rough_s, least), most)


def _rough(problem: FewShotProblem) -> tuple[float, float]:
    """Seconds a token and layer, and of the whole run: within a factor of two or so, at once."""
    model, (stage1, stage2) = problem.model, iterations_of(problem)
    probe = _probe(problem)
    token_s = layer_seconds(model.runtime, model.backbone, probe) / probe.n_layer_tokens
    inline = _n_inline(problem)
    tokens = sum(x.n_tokens + inline for x in problem.train_inputs)
    evaluations = stage1 + (1 if inline else 0.5) * stage2  # prefixes: half of the layers, on average
    return token_s, token_s * model.backbone.config.n_layers * tokens * evaluations


def _probe(problem: FewShotProblem) -> Probe:
    """A batch of the run's own kind: for another one, TensorRT would build plans that no run uses."""
    lengths, meta = sorted(x.n_tokens for x in problem.train_inputs), problem.model.prompts.meta
    return Probe.within(
        candidates=problem.config.layers.popsize if _on_gpu(problem) else 1,
        examples=len(lengths),
        tokens=lengths[len(lengths) // 2],
        prompt_tokens=meta.prompt_tokens,
        inline=meta.injection != "prefix",
    )


def _on_gpu(problem: FewShotProblem) -> bool:
    return str(problem.model.runtime.device).startswith("cuda")


def iterations_of(problem: FewShotProblem) -> tuple[int, int]:
    """Iterations of the stages."""
    config, space = problem.config, problem.model.space()
    stage1 = stage_one_iterations(
        config.router.method,
        config.router.iterations,
        space.kind,
        (space.n_layers, space.n_modules),
        config.iters,
    )
    return stage1, 0 if config.router_only else config.iters - stage1


def _n_inline(problem: FewShotProblem) -> int:
    return problem.model.prompts.meta.n_inline


def _plan(problem: FewShotProblem, token_s: float, budget_s: float) -> Plan:
    config, model = problem.config, problem.model
    runtime, space = model.runtime, model.space()
    popsize = config.layers.popsize
    train = problem.train_inputs
    lengths = [x.n_tokens for x in train]
    on_gpu = _on_gpu(problem)  # there, part of a batch would say nothing of the whole
    populations, suggest1 = _stage_one(problem, iterations_of(problem)[0])
    stage1 = sum(populations)  # fewer than asked for where there are not as many routers
    stage2 = 0 if config.router_only else config.iters - stage1
    sizes = Counter(populations)
    usual = max(sizes, key=lambda p: p * sizes[p])
    timer = LayerTimer(
        runtime,
        model.backbone,
        model.prompts,
        train,
        population=max(usual, popsize if stage2 else 1),
        target_tokens=math.inf if on_gpu else target_tokens(budget_s, token_s),
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
    population = popsize if stage2 else usual
    objective = problem.objective
    batches = (
        objective.batches(population)
        if isinstance(objective, CudaObjective)
        else _batches(lengths, population, objective.micro_batch_tokens, _n_inline(problem))
    )
    return Plan(
        task=problem.card.task,
        seed=config.seed,
        backbone=model.backbone.name,
        kind=space.kind,
        iterations=(stage1, stage2),
        engine=engine_of(problem),
        training={
            "examples": len(train),
            "min_tokens": min(lengths),
            "mean_tokens": sum(lengths) / len(lengths),
            "max_tokens": max(lengths),
            **batches,
        },
        work=work,
        costs=costs,
        suggest_s=(suggest1, suggest2),
        lanes=lanes_for(objective, AT_ONCE),
        seconds=Prediction(
            prepare_s=forwards.prepare_s,
            stage1_s=forwards.stage1_s + suggest1,
            stage2_s=forwards.stage2_s + suggest2,
            dev_s=forwards.dev_s,
            test_s=forwards.test_s,
        ),
    )


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
        search = create_router_search(
            config.router.method, shape, iterations, space.warm, rng, space.modules()
        )
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
                rounds, rest = divmod(iterations - done, len(routers))
                sizes += [len(routers)] * rounds + [rest] * (rest > 0)
                return tuple(sizes), spent + (rounds + (rest > 0)) * last
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
    if _on_gpu(problem):
        return visits * max(0.0, generation - float(np.mean(costs.visit_s)))
    return visits * generation / usable_cores()

"""The plan of a run, for ``mp2 bbt --explain`` and the line at its start: what runs where and how often.

How long it takes is not predicted: the progress line has what is left at the pace that was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mp2.optimizers.router_search import stage_one_iterations
from mp2.runs.precision import agreement_line
from mp2.runs.together import AT_ONCE

if TYPE_CHECKING:
    from mp2.engine.agreement import Agreement
    from mp2.runs.few_shot_problem import FewShotProblem


def iterations_of(problem: FewShotProblem) -> tuple[int, int]:
    """Iterations of the stages; stage I may have fewer, where there are not as many routers."""
    config, space = problem.config, problem.space
    stage1 = stage_one_iterations(
        config.router.method,
        config.router.iterations,
        space.kind,
        (space.n_layers, space.n_modules),
        config.iters,
    )
    return stage1, 0 if config.router_only else config.iters - stage1


def run_plan(problem: FewShotProblem) -> dict[str, Any]:
    """What a run will do, as JSON values."""
    model, config, lengths = problem.model, problem.config, [x.n_tokens for x in problem.train_inputs]
    stage1, stage2 = iterations_of(problem)
    return {
        "task": problem.card.task,
        "seed": config.seed,
        "kind": model.kind,
        "backbone": model.backbone.name,
        "prompts": str(config.prompts),
        "head": problem.head.as_dict(),
        "engine": {
            "runtime": model.backend.name,
            "precision": model.backend.precision,
            "device": str(model.backend.device),
            "threads": config.threads if str(model.backend.device) == "cpu" else None,
            "reason": model.backend.reason,
        },
        "examples": {
            "train": problem.n_train,
            "dev": problem.n_dev,
            "test": problem.n_test if config.test else 0,
            "min_tokens": min(lengths),
            "mean_tokens": round(sum(lengths) / len(lengths), 1),
            "max_tokens": max(lengths),
        },
        "batches": problem.objective.cut(config.layers.popsize),
        "iterations": {"stage1": stage1, "stage2": stage2},
        "router_search": config.router.method,
        "popsize": config.layers.popsize,
        "side_by_side": min(
            AT_ONCE, problem.objective.side_by_side()
        ),  # runs that the device computes at a time
    }


def plan_rows(plan: dict[str, Any], n_runs: int, agreement: Agreement | None) -> list[tuple[str, str]]:
    """The plan for people: names and words; ``n_runs`` is how many like it there are."""
    examples, batches, n = plan["examples"], plan["batches"], plan["iterations"]
    rows = [
        ("task", f"{plan['task']}, seed {plan['seed']}" + (f" and {n_runs - 1} more runs" * (n_runs > 1))),
        ("backbone", f"{plan['backbone']}, {plan['kind']} prompts {plan['prompts']}"),
        ("head", head_line(plan)),
        ("engine", engine_line(plan)),
    ]
    if agreement is not None:
        line = agreement_line(plan["engine"]["precision"], agreement, examples["train"])
        rows.append(("precision", line.removeprefix("precision ")))
    rows += [
        (
            "examples",
            f"{examples['train']} train of {examples['min_tokens']} to {examples['max_tokens']} tokens "
            f"(mean {examples['mean_tokens']:.0f}), {examples['dev']} dev, {examples['test']} test",
        ),
        (
            "batches",
            f"{batches['batches']} for {batches['population']} candidates: {batches['groups']} groups by "
            f"length, at most {batches['batch_tokens']} tokens each, {100 * batches['padding']:.0f}% padding",
        ),
        ("stage I", f"{n['stage1']} iterations, router search {plan['router_search']}"),
    ]
    if n["stage2"]:
        rows.append(("stage II", f"{n['stage2']} iterations, CMA-ES with a population of {plan['popsize']}"))
    if n_runs > 1 and plan["side_by_side"] > 1:
        lanes = min(n_runs, plan["side_by_side"])
        rows.append(("together", f"{lanes} side by side, each on a CUDA stream of its own"))
    return rows


def head_line(plan: dict[str, Any]) -> str:
    """What reads the answers, and why."""
    head = plan["head"]
    layer = f" on the states of layer {head['layer']}" if "layer" in head else ""
    ngrams = " and token n-grams" if head.get("ngrams") else ""
    return f"{head['kind']}{layer}{ngrams} ({head['reason']})"


def engine_line(plan: dict[str, Any]) -> str:
    """What computes, and why."""
    engine = plan["engine"]
    n = engine["threads"]
    threads = f", {n} thread{'s' if n > 1 else ''}" if n else ""
    return f"{engine['runtime']}, {engine['precision']}, {engine['device']}{threads} ({engine['reason']})"


def _name(problem: FewShotProblem) -> str:
    return f"{problem.card.task}, seed {problem.config.seed}"


def opening_lines(problems: Sequence[FewShotProblem], agreements: Sequence[Agreement | None]) -> list[str]:
    """What runs and why, and what a person may not expect: said before the first forward.

    ``agreements``: what the precision costs each of the ``problems``; said for each task's first.
    """
    plan, config = run_plan(problems[0]), problems[0].config
    stage1, stage2 = plan["iterations"].values()
    examples, n_batches = plan["examples"], plan["batches"]["batches"]
    lines = [
        f"{engine_line(plan)}; {plan['backbone']}, {plan['kind']}; {examples['train']} examples of "
        f"{examples['min_tokens']} to {examples['max_tokens']} tokens, {n_batches} batches for "
        f"{plan['popsize']} candidates; {stage1} + {stage2} iterations"
    ]
    for problem in problems if config.head == "auto" else problems[:1]:
        which = "" if len(problems) == 1 or config.head != "auto" else _name(problem) + ": "
        if problem.head.kind != "span" or problem.head.compared:
            lines.append(f"{which}head {head_line({'head': problem.head.as_dict()})}")
        if config.ridge_features != "states+ngrams" and problem.head.kind != "ridge":
            use = "the ridge head that was compared" if problem.head.compared else "nothing"
            lines.append(f"{which}--ridge-features {config.ridge_features} was for {use}")
    n_tasks = len({problem.card.task for problem in problems})
    said: set[str] = set()
    for problem, found in zip(problems, agreements, strict=True):
        if found is not None and problem.card.task not in said:
            line = agreement_line(problem.model.backend.precision, found, problem.n_train)
            lines.append(line if n_tasks == 1 else f"{problem.card.task}: {line}")
        of_task = [] if problem.card.task in said else problem.data.lines(problem.head.kind)
        of_seed = [f"seed {problem.config.seed}: {remark}" for remark in problem.remarks]
        which = "" if n_tasks == 1 else f"{problem.card.task}: "
        lines += [f"{which}{line}" for line in of_task + of_seed]
        said.add(problem.card.task)
    if not stage2 and not config.router_only:
        lines.append(f"stage I takes all {config.iters} iterations; --router-iters leaves some to stage II")
    elif stage2 < plan["popsize"] and not config.router_only:
        lines.append(
            f"stage II has {stage2} iterations, less than one generation of {plan['popsize']}: CMA-ES learns "
            "nothing from them; a smaller --popsize or more --iters gives it some"
        )
    if problems[0].model.prompts.meta.router_inference == "soft" and stage1 > 1:
        lines.append(
            "these prompts were trained with soft routers; the search tries routers of 0 and 1, the corners "
            "of the soft ones ('mp2 tune' learns soft weights)"
        )
    return lines

"""Plans in words: the line at the start of a run, and what ``mp2 bbt --explain`` prints."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mp2.runs.planning import Plan, engine_of, iterations_of, plan_run, plan_start
from mp2.runs.precision import agreement_line
from mp2.runs.report import clock

if TYPE_CHECKING:
    from mp2.engine.agreement import Agreement
    from mp2.runs.few_shot_problem import FewShotProblem

__all__ = ["Plan", "announce", "engine_line", "plan_line", "plan_run", "plan_table"]

_WORTH_S = 30.0  # a run that will surely be shorter gets no prediction


def announce(problems: Sequence[FewShotProblem], agreements: Sequence[Agreement | None]) -> None:
    """Say on stderr what runs and why, and about how long a run of each task will take if that is long.

    ``agreements``: what the precision costs each of the ``problems``; said for each task's first.
    """
    lines = [engine_line(engine_of(problems[0]))]
    first: dict[str, tuple[FewShotProblem, Agreement | None]] = {}
    for problem, found in zip(problems, agreements, strict=True):
        first.setdefault(problem.card.task, (problem, found))
    for task, (problem, found) in first.items():
        if found is not None:
            line = agreement_line(problem.model.runtime.precision, found, problem.n_train)
            lines.append(line if len(first) == 1 else f"{task}: {line}")
        plan = plan_start(problem, _WORTH_S)
        if plan is not None and len(problems) == 1:
            lines[0] += f"; {plan_line(plan)}"
        elif plan is not None:
            lines.append(f"a run of {task}: {plan_line(plan)}")
    config = problems[0].config
    stage2, popsize = iterations_of(problems[0])[1], config.layers.popsize
    if not stage2 and not config.router_only:
        lines.append(f"stage I takes all {config.iters} iterations; --router-iters leaves some to stage II")
    elif stage2 < popsize and not config.router_only:
        lines.append(
            f"stage II has {stage2} iterations, less than one generation of {popsize}: CMA-ES learns nothing "
            "from them; a smaller --popsize or more --iters gives it some"
        )
    if problems[0].model.prompts.meta.router_inference == "soft" and iterations_of(problems[0])[0] > 1:
        lines.append(
            "these prompts were trained with soft routers; the search tries routers of 0 and 1, the corners "
            "of the soft ones ('mp2 tune' learns soft weights)"
        )
    for line in lines:
        print(f"mp2: {line}", file=sys.stderr, flush=True)


def plan_line(plan: Plan) -> str:
    """How long, in one line."""
    s = plan.seconds
    parts = [("stage I", s.stage1_s), ("stage II", s.stage2_s), ("dev", s.dev_s), ("test", s.test_s)]
    return f"about {clock(s.total_s)} (" + ", ".join(f"{name} {clock(t)}" for name, t in parts if t) + ")"


def engine_line(engine: dict[str, Any]) -> str:
    """What runs, and why."""
    n = engine["threads"] if engine["device"] == "cpu" else None
    threads = f", {n} thread{'s' if n > 1 else ''}" if n else ""
    return f"{engine['runtime']}, {engine['precision']}, {engine['device']}{threads} ({engine['reason']})"


def plan_table(plan: Plan, n_seeds: int = 1) -> str:
    """The plan for people."""
    training, costs, s = plan.training, plan.costs, plan.seconds
    stage1, stage2 = plan.iterations
    rows = [("engine", engine_line(plan.engine))]
    if plan.agreement is not None:
        line = agreement_line(plan.engine["precision"], plan.agreement, training["examples"])
        rows.append(("precision", line.removeprefix("precision ")))
    rows += [
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
        rows.append(("seeds", _seeds(plan, n_seeds)))
    width = max(len(name) for name, _ in rows)
    lines = [f"{plan.task}  {plan.kind}  seed {plan.seed}  backbone {plan.backbone}"]
    for name, text in rows:
        indent = " " * (width + 2)
        lines.append(textwrap.fill(text, 110, initial_indent=name.ljust(width + 2), subsequent_indent=indent))
    return "\n".join(lines)


def _seeds(plan: Plan, n_seeds: int) -> str:
    most = clock(n_seeds * plan.seconds.total_s)
    if plan.lanes == 1:
        return f"{most}  at most, for {n_seeds} seeds one after another"
    n_lanes = min(plan.lanes, n_seeds)
    least = clock(-(-n_seeds // n_lanes) * plan.seconds.total_s)
    return (
        f"{least} to {most}  for {n_seeds} seeds, {n_lanes} side by side, each on a CUDA stream of its own: "
        "how much they overlap is not predicted"
    )

"""What ``mp2 bbt`` was asked for, as a config, and its results one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mp2.errors import UsageError
from mp2.optimizers.config import BbtConfig, LayerConfig, RouterConfig
from mp2.optimizers.report import ProgressLine
from mp2.optimizers.run import resume_run, start_runs

if TYPE_CHECKING:
    import click

    from mp2.optimizers.explain import Plan

_WITH_RESUME = {"resume", "as_json"}


def given_options(ctx: click.Context) -> set[str]:
    """Names of the options that stand on the command line."""
    from click.core import ParameterSource

    return {n for n in ctx.params if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE}


def bbt_plan(options: dict[str, Any]) -> tuple[Plan, int]:
    """The plan of the run (the first seed's) and the number of seeds; nothing is tuned.

    Raises:
        UsageError: options that do not go together.
    """
    from mp2.optimizers.explain import plan_run
    from mp2.optimizers.run import make_problem

    if options["resume"] or not options["task"]:
        raise UsageError("--explain plans a new run: give --task NAME with it, and no --resume")
    config, seeds = config_of(options)
    plan = plan_run(make_problem(config))
    assert plan is not None
    return plan, len(seeds)


def bbt_results(options: dict[str, Any], given: set[str]) -> Iterator[dict[str, Any]]:
    """Run or resume what the options say; yields each run's result.

    Raises:
        UsageError: options that do not go together.
    """
    if options["resume"]:
        others = sorted(given - _WITH_RESUME)
        if others:
            raise UsageError(
                f"--resume takes everything from the run's config.json; drop --{others[0].replace('_', '-')}"
            )
        progress = ProgressLine()
        try:
            yield resume_run(Path(options["resume"]), progress)
        finally:
            progress.close()
        return
    if not options["task"]:
        raise UsageError("no task: give --task NAME ('mp2 tasks' lists them), a card, or --resume RUNDIR")
    config, seeds = config_of(options)
    lines: list[ProgressLine] = []

    def observe() -> ProgressLine:
        lines.append(ProgressLine())
        return lines[-1]

    try:
        for result in start_runs(config, seeds, Path(options["out"]), observe):
            lines[-1].close()
            yield result
    finally:
        for line in lines:
            line.close()


def config_of(options: dict[str, Any]) -> tuple[BbtConfig, list[int]]:
    """The config of the first seed, and all seeds."""
    seeds = _seeds(options["seed"], options["seeds"])
    config = BbtConfig(
        task=options["task"],
        data=options["data"],
        backbone=options["backbone"],
        prompts=options["prompts"],
        kind=options["kind"] or "auto",
        iters=options["iters"],
        router_only=options["router_only"],
        router=RouterConfig(method=options["router_search"], iterations=options["router_iters"]),
        layers=LayerConfig(
            popsize=options["popsize"],
            cma=options["cma"],
            sigma_input=options["sigma_input"],
            sigma_deep=options["sigma_deep"],
            sigma_shallow=options["sigma_shallow"],
        ),
        seed=seeds[0],
        shots=options["shots"],
        max_tokens=options["max_tokens"],
        test=not options["no_test"],
        test_limit=options["test_limit"],
        runtime=options["runtime"],
        precision=options["precision"],
        device=options["device"],
        threads=options["threads"],
        engine=options["engine"],
    )
    return config, seeds


def _seeds(one: int | None, several: str | None) -> list[int]:
    if several is None:
        return [8 if one is None else one]
    if one is not None:
        raise UsageError("--seed and --seeds were both given; give one of them")
    try:
        seeds = [int(part) for part in several.split(",")]
    except ValueError:
        raise UsageError(
            f"--seeds is '{several}', expected whole numbers with commas: 8,13,21,42,100"
        ) from None
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds is '{several}', expected different numbers of 0 or more")
    return seeds

"""``mp2 bbt``: tune prompts for a task without gradients."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mp2.commands.options import TASK, build, config_options, log_option, named_tasks, read_seeds
from mp2.commands.paths import PATH
from mp2.commands.printing import as_json_text, given, notes, quiet_option, show, show_table
from mp2.errors import UsageError
from mp2.optimizers.config import Kind
from mp2.runs.config import BbtConfig

_WITH_RESUME = {"resume", "loggers", "as_json", "quiet"}
_SIGMAS: dict[Kind, tuple[str, ...]] = {"shallow": ("sigma_shallow",), "deep": ("sigma_input", "sigma_deep")}
_STAGE_TWO = ("popsize", "cma", *_SIGMAS["deep"], *_SIGMAS["shallow"])


@click.command(short_help="Tune prompts for a task without gradients.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    type=TASK,
    help="A name of 'mp2 tasks', or your own card (a TOML file); again for more.",
)
@click.option("--seed", type=int, help="Draws the few-shot split and drives the search.  [default: 8]")
@click.option("--seeds", metavar="8,13,...", help="Several seeds, a run each, done together.")
@config_options(BbtConfig, skip=("task", "seed"))
@click.option("--out", type=PATH, default="runs", show_default=True, help="Where run folders are made.")
@click.option(
    "--resume",
    type=PATH,
    multiple=True,
    metavar="RUNDIR",
    help="Go on with a run that was cut off; again for more, or a folder of runs. What it needs and has "
    "moved: --backbone, --prompts, --engine, --data.",
)
@log_option
@click.option("--explain", is_flag=True, help="Print what the run will do; tune nothing.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (a list if several).")
@click.pass_context
def bbt(ctx: click.Context, /, as_json: bool, **typed: Any) -> None:
    """Tune prompts for a task without gradients: search the router, then CMA-ES layer by layer.

    --method bbt and bbtv2 are the published methods that MP2 is compared with: random projections, no router,
    and the checkpoint's masked-language-model head read at label words.
    """
    from mp2.commands.report import show_result, show_series

    if typed.pop("explain"):
        _explain(typed, given(ctx), as_json)
        return
    results = []
    try:
        for result in _results(typed, given(ctx)):
            results.append(result)
            if not as_json:
                show_result(result)
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        click.echo(as_json_text(results if _asks_for_many(typed) else results[0]))
    elif len(results) > 1:
        show_series(results)
        show(f"their curves in one picture: mp2 compare {shlex.join(r['run_dir'] for r in results)}")


def _results(typed: dict[str, Any], given: set[str]) -> Iterator[dict[str, Any]]:
    """Run or resume what was typed; each run's result as it comes."""
    from mp2.runs.loggers import create_loggers
    from mp2.runs.needs import MOVED
    from mp2.runs.progress import ProgressLine
    from mp2.runs.series import find_runs, resume_series, start_series

    say, line = notes(quiet := typed.pop("quiet")), ProgressLine()
    logger = create_loggers(typed.pop("loggers"), None if quiet else line.logger)
    if typed["resume"]:
        moved = {name: typed[name] for name in MOVED if name in given}
        others = sorted(given - _WITH_RESUME - set(moved))
        if others:
            raise UsageError(f"--resume takes everything from the run's config.json; drop {_flag(others[0])}")
        run_dirs = [run_dir for path in typed["resume"] for run_dir in find_runs(Path(path))]
        results = resume_series(list(dict.fromkeys(run_dirs)), logger, say, moved)
    else:
        out = Path(typed["out"])
        configs = _configs(typed, given)
        results = start_series(
            configs, out, logger, check=lambda model: _check_kind(given, model.kind), say=say
        )
    try:
        for result in results:
            line.close()
            yield result
    finally:
        line.close()


def _explain(typed: dict[str, Any], given: set[str], as_json: bool) -> None:
    """Print the plan of the first run, and how many there are."""
    from mp2.runs.plan import plan_rows, run_plan
    from mp2.runs.precision import precision_agreement
    from mp2.runs.run import make_problem

    if typed["resume"] or not typed["tasks"]:
        raise UsageError("--explain plans a new run: give --task NAME with it, and no --resume")
    configs = _configs(typed, given)
    problem = make_problem(configs[0])
    _check_kind(given, problem.model.kind)
    agreement = precision_agreement(problem)  # an overflow in it changes the precision that is planned
    plan = run_plan(problem)
    if as_json:
        found = None if agreement is None else agreement.as_dict()
        click.echo(as_json_text(plan | {"precision_agreement": found}))
    else:
        show_table(plan_rows(plan, len(configs), agreement))


def _asks_for_many(typed: dict[str, Any]) -> bool:
    """Whether there can be more than one result: then ``--json`` prints a list."""
    from mp2.runs.series import find_runs

    if typed["resume"]:
        first = Path(typed["resume"][0])
        return len(typed["resume"]) > 1 or find_runs(first) != [first]
    return typed["seeds"] is not None or len(named_tasks(typed["tasks"])) > 1


def _configs(typed: dict[str, Any], given: set[str]) -> list[BbtConfig]:
    """A config for every task and seed; the seeds of a task are neighbours."""
    tasks, seeds = named_tasks(typed["tasks"]), read_seeds(typed["seed"], typed["seeds"])
    if not tasks:
        raise UsageError("no task: give --task NAME ('mp2 tasks' lists them), a card, or --resume RUNDIR")
    if typed["method"] != "mp2" and "keep" in given:
        raise UsageError(f"method {typed['method']} has its own rule of what a layer keeps: drop --keep")
    if typed["router_only"] and typed["router_search"] == "none":
        raise UsageError("--router-only with --router-search none leaves nothing to search; drop one")
    config = build(BbtConfig, typed, task=tasks[0], seed=seeds[0])
    for name in _STAGE_TWO:
        if {name, "router_only"} <= given:
            raise UsageError(f"--router-only has no stage II, which {_flag(name)} is for: drop one of them")
    return [replace(config, task=task, seed=seed) for task in tasks for seed in seeds]


def _check_kind(given: set[str], kind: Kind) -> None:
    """Raise ``UsageError`` for a step size of the ``kind`` of prompts that these are not."""
    for other, names in _SIGMAS.items():
        for name in names:
            if other != kind and name in given:
                raise UsageError(f"{_flag(name)} is for {other} prompts, and these are {kind}: drop it")


def _flag(name: str) -> str:
    return f"--{'task' if name == 'tasks' else name.replace('_', '-')}"

"""What ``mp2 bbt`` was asked for, as configs, and the results one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mp2.errors import UsageError
from mp2.optimizers.config import Kind, LayerConfig, RouterConfig
from mp2.runs.config import BbtConfig
from mp2.runs.report import SeriesProgress
from mp2.runs.series import find_runs, resume_series, start_series

_WITH_RESUME = {"resume", "as_json"}
_SIGMAS: dict[Kind, tuple[str, ...]] = {"shallow": ("sigma_shallow",), "deep": ("sigma_input", "sigma_deep")}
_STAGE_TWO = ("popsize", "cma", *_SIGMAS["deep"], *_SIGMAS["shallow"])


def bbt_plan(options: dict[str, Any], given: set[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The plan of the first run as JSON values, and as names and words for people; nothing is tuned.

    Raises:
        UsageError: options that do not go together.
    """
    from mp2.runs.plan import plan_rows, run_plan
    from mp2.runs.precision import precision_agreement
    from mp2.runs.run import make_problem

    if options["resume"] or not options["task"]:
        raise UsageError("--explain plans a new run: give --task NAME with it, and no --resume")
    configs = configs_of(options)
    check_stages(given)
    problem = make_problem(configs[0])
    check_kind(given, problem.model.kind)
    agreement = precision_agreement(problem)
    plan = run_plan(problem)
    found = None if agreement is None else agreement.as_dict()
    return plan | {"precision_agreement": found}, plan_rows(plan, len(configs), agreement)


def bbt_results(options: dict[str, Any], given: set[str]) -> Iterator[dict[str, Any]]:
    """Run or resume what the options say; yields each run's result.

    Raises:
        UsageError: options that do not go together.
    """
    if options["resume"]:
        others = sorted(given - _WITH_RESUME)
        if others:
            raise UsageError(f"--resume takes everything from the run's config.json; drop {_flag(others[0])}")
        run_dirs = [run_dir for path in options["resume"] for run_dir in find_runs(Path(path))]
        progress = SeriesProgress()
        results = resume_series(list(dict.fromkeys(run_dirs)), progress.observer)
    else:
        if not options["task"]:
            raise UsageError("no task: give --task NAME ('mp2 tasks' lists them), a card, or --resume RUNDIR")
        configs = configs_of(options)
        check_stages(given)
        progress = SeriesProgress()
        results = start_series(
            configs,
            Path(options["out"]),
            progress.observer,
            check=lambda model: check_kind(given, model.kind),
        )
    try:
        for result in results:
            progress.close()
            yield result
    finally:
        progress.close()


def asks_for_many(options: dict[str, Any]) -> bool:
    """Whether the options can give more than one result: then ``--json`` prints a list."""
    if options["resume"]:
        return len(options["resume"]) > 1 or find_runs(Path(options["resume"][0])) != [
            Path(options["resume"][0])
        ]
    return options["seeds"] is not None or len(_tasks(options["task"])) > 1


def check_stages(given: set[str]) -> None:
    """Raise ``UsageError`` for an option of stage II beside ``--router-only``."""
    for name in _STAGE_TWO:
        if {name, "router_only"} <= given:
            raise UsageError(f"--router-only has no stage II, which {_flag(name)} is for: drop one of them")


def check_kind(given: set[str], kind: Kind) -> None:
    """Raise ``UsageError`` for a step size of the ``kind`` of prompts that these are not."""
    for other, names in _SIGMAS.items():
        for name in names:
            if other != kind and name in given:
                raise UsageError(f"{_flag(name)} is for {other} prompts, and these are {kind}: drop it")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def configs_of(options: dict[str, Any]) -> list[BbtConfig]:
    """A config for every task and seed; the seeds of a task are neighbours."""
    seeds, tasks = read_seeds(options["seed"], options["seeds"]), _tasks(options["task"])
    if options["router_only"] and options["router_search"] == "none":
        raise UsageError("--router-only with --router-search none leaves nothing to search; drop one")
    config = BbtConfig(
        task=tasks[0],
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
    return [replace(config, task=task, seed=seed) for task in tasks for seed in seeds]


def read_seeds(one: int | None, several: str | None) -> list[int]:
    """The seeds of ``--seed`` or ``--seeds``; raises ``UsageError`` for both, or for what are no seeds."""
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


def _tasks(given: Sequence[str]) -> list[str]:
    """The tasks of all ``--task``, each a name, a card or several with commas."""
    tasks: list[str] = []
    for text in given:
        tasks += [text] if Path(text).exists() else [part.strip() for part in text.split(",")]
    twice = [task for task in tasks if tasks.count(task) > 1]
    if twice:
        raise UsageError(f"task '{twice[0]}' was given more than once")
    return tasks

"""Runs started and resumed, alone or several as one: seeds and tasks that share the engine."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

from mp2.errors import FormatError, LossError, Mp2Error, UsageError
from mp2.folder_lock import ReadOnlyFolderError
from mp2.limits import check_new_folder
from mp2.messages import say as log
from mp2.runs.config import BbtConfig
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.frozen_model import FrozenModel, load_model, resolve_paths
from mp2.runs.loggers.logger import Logger
from mp2.runs.needs import NEEDS, located, say_what_it_loads, untyped
from mp2.runs.recorder import timed
from mp2.runs.result import read_result
from mp2.runs.run import Run, make_problem
from mp2.runs.run_folder import begun_head, how_to_end, locked, new_folder, read_config, resume_command
from mp2.runs.task_data import TaskData
from mp2.runs.together import AT_ONCE, Server

_MODEL_FIELDS = (
    "backbone",
    "prompts",
    "kind",
    "runtime",
    "precision",
    "device",
    "threads",
    "engine",
    "endpoint",
)


def start_run(
    config: BbtConfig, out: str | Path, logger: Logger | None = None, model: FrozenModel | None = None
) -> dict[str, Any]:
    """Tune in a new folder under ``out``; returns the result, as ``result.json`` has it (docs/api.md).

    ``logger`` follows the run (`mp2.runs.loggers`). ``model`` is one that was loaded before.

    Raises:
        UsageError: bad names, files or data; nothing was made.
        LossError: no candidate of a generation had a finite loss.
    """
    (result,) = start_series([config], out, lambda: logger or Logger(), model)
    return result


def start_series(
    configs: Sequence[BbtConfig],
    out: str | Path,
    logger: Callable[[], Logger] = Logger,
    model: FrozenModel | None = None,
    check: Callable[[FrozenModel], None] = lambda model: None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Tune in new folders under ``out``, all with one engine; yields the results in the configs' order.

    The configs may differ in task, seed and everything that does not choose the engine. Each result is the
    one that the run would have alone, bit for bit on CPUs in float32. Nothing is made before everything that
    can be wrong was looked at; ``check`` may refuse the model that was loaded. ``logger`` makes a logger for
    each run, ``say`` is told what runs.
    """
    from mp2.runs.plan import opening_lines
    from mp2.runs.precision import precision_agreement

    started = time.perf_counter()
    out = Path(out)
    check_new_folder(out)
    model = model or load_model(resolve_paths(configs[0]))
    check(model)
    problems = _problems(configs, model)
    agreements = [precision_agreement(problem) for problem in problems]
    for problem in problems:  # a first evaluation that overflows has changed the precision
        problem.config = replace(problem.config, precision=model.backend.precision)
    for line in opening_lines(problems, agreements):
        say(f"mp2: {line}")
    with ExitStack() as locks:
        runs = []
        for problem, agreement in zip(problems, agreements, strict=True):
            method = problem.config.label(model.kind)
            run_dir = new_folder(out, f"{problem.card.task}-{method}-seed{problem.config.seed}")
            locks.enter_context(locked(run_dir))
            runs.append(Run(run_dir, problem, logger(), started))
            try:
                runs[-1].write_beginning(agreement)
            except OSError:  # a full disk: what has not begun is no run
                shutil.rmtree(run_dir, ignore_errors=True)
                raise
        del problems, problem
        yield from _tune(runs, say)


def resume_run(
    run_dir: str | Path, logger: Logger | None = None, moved: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """Go on with a run that was cut off; the result of one that has ended is read back.

    ``moved`` says where what it needs is now: ``backbone``, ``revision``, ``prompts``, ``engine``, ``data``.

    A run has ended if its result and its tuned prompt are there and readable: what is missing or damaged is
    written again from the journal.

    Raises:
        UsageError: no run there, another process works on it, or what it depends on has changed.
    """
    (result,) = resume_series([Path(run_dir)], lambda: logger or Logger(), moved=moved)
    return result


def resume_series(
    run_dirs: Sequence[Path],
    logger: Callable[[], Logger] = Logger,
    say: Callable[[str], None] = lambda line: None,
    moved: Mapping[str, str | None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Go on with several runs as one; neighbours in the list share the engine where they have the same.

    ``moved`` says where what they need is now (`mp2.runs.needs`).
    """

    def engine(pair: tuple[Path, BbtConfig]) -> tuple[Any, ...]:
        return tuple(getattr(pair[1], name) for name in _MODEL_FIELDS)

    pairs = [(run_dir, read_config(run_dir)) for run_dir in run_dirs]
    for _, group in groupby(pairs, engine):
        members = dict(group)
        with ExitStack() as locks:
            found = {}
            for run_dir in members:
                try:
                    locks.enter_context(locked(run_dir))
                except ReadOnlyFolderError:  # of a run that has ended nothing is written
                    found[run_dir] = read_result(run_dir)
                    if found[run_dir] is None:
                        raise
                else:
                    found[run_dir] = _ended(run_dir)
            open_dirs = [run_dir for run_dir, result in found.items() if result is None]
            going_on = _go_on({run_dir: members[run_dir] for run_dir in open_dirs}, logger, say, moved or {})
            for result in found.values():
                yield next(going_on) if result is None else result


def _ended(run_dir: Path) -> dict[str, Any] | None:
    """The result of a run that has ended; None: it goes on, or what it left is made again by a replay.

    Raises:
        UsageError: a run of ``mp2 tune``, which has no journal.
    """
    try:
        result, damage = read_result(run_dir), None
    except FormatError as error:
        result, damage = None, str(error)
    if result is None and (run_dir / "tune.json").exists():
        raise UsageError(f"{damage or f'{run_dir} has no result'}; {how_to_end(run_dir)}")
    if damage is not None:
        log(f"{damage}; replaying the run's journal to write it again")
    return result


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it is a run's, else the run folders in it.

    Raises:
        UsageError: there are none.
    """
    if (folder / "config.json").exists() or not folder.is_dir():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/config.json"))
    if not found:
        raise UsageError(f"{folder} is not a run folder: there is no config.json in it, nor one folder down")
    return found


def _go_on(
    configs: dict[Path, BbtConfig],
    logger: Callable[[], Logger],
    say: Callable[[str], None],
    moved: Mapping[str, str | None],
) -> Iterator[dict[str, Any]]:
    from mp2.tasks import load_card

    if not configs:
        return
    started = time.perf_counter()
    here = {run_dir: located(run_dir, config, moved, NEEDS) for run_dir, config in configs.items()}
    for run_dir, config in configs.items():
        named = untyped(config, moved, (*NEEDS, "endpoint"))
        say_what_it_loads(run_dir, named, lambda line: say(f"mp2: {line}"))
    model = load_model(next(iter(here.values())))
    runs = []
    for run_dir, config in configs.items():  # as it was: its hash says that it is the same run
        card = load_card(run_dir / "card.toml")
        data = TaskData(here[run_dir], card, model)
        problem = FewShotProblem(config, card, model, data, begun_head(run_dir))
        runs.append(Run(run_dir, problem, logger(), started))
    yield from _tune(runs, say)


def _problems(configs: Sequence[BbtConfig], model: FrozenModel) -> list[FewShotProblem]:
    """The problems, with each task's data read once."""
    known: dict[tuple[Any, ...], TaskData] = {}
    problems = []
    for config in configs:
        key = (config.task, config.data, config.max_tokens, config.test_limit)
        problems.append(make_problem(config, model, known.get(key)))
        known[key] = problems[-1].data
    return problems


def _tune(runs: list[Run], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Drive the runs, together if there are several; yields their results in order."""
    try:
        with sigterm_exits(), one_blas_thread():
            if len(runs) > 1:
                _share_device(runs, say)
                server = Server()
                works = [lambda run=run: run.drive(server.timed) for run in runs]  # type: ignore[misc]
                yield from _in_order((n, runs[n].finish(found)) for n, found in server.run(works))
                return
            result = runs[0].finish(runs[0].drive(timed))
        yield result
    except (KeyboardInterrupt, SystemExit, LossError):
        left = [run for run in runs if not run.ended]
        where = f"at iteration {left[0].iteration}" if len(runs) == 1 else f"{len(left)} of {len(runs)} runs"
        command = resume_command(*(run.run_dir for run in left))
        log(f"stopped {where}; go on with: {command}")
        raise


def _share_device(runs: Sequence[Run], say: Callable[[str], None]) -> None:
    """Let the runs compute side by side where the device can, and say so."""
    n_lanes = min(len(runs), AT_ONCE, *(run.objective.side_by_side() for run in runs))
    runs[0].objective.forward.backend.share(n_lanes)
    if n_lanes > 1:
        say(f"mp2: {len(runs)} runs share the device; {n_lanes} side by side, each on its own CUDA stream")


def _in_order(finished: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The results by number, each as soon as those before it are there; an error comes after all of them."""
    held: dict[int, dict[str, Any]] = {}
    n_yielded = 0
    try:
        for number, result in finished:
            held[number] = result
            while n_yielded in held:
                yield held.pop(n_yielded)
                n_yielded += 1
    except Mp2Error:
        yield from (held[number] for number in sorted(held))
        raise


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """SIGTERM and SIGHUP become ``SystemExit``, so that they end a run as tidily as Ctrl-C does.

    A signal that is ignored, as ``nohup`` has it, stays so.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before: dict[int, Any] = {}
    try:
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, on_signal)
    except ValueError:  # not the main thread: whoever owns it decides
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """CMA-ES at d = 300 is faster with one thread, and its sums then never depend on the number of cores."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(limits=1, user_api="blas"):
        yield

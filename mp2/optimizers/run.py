"""A run: one folder that holds everything of it, made, locked, resumed and finished here.

``config.json`` (with what was resolved and the versions), ``card.toml`` (the task card as it was),
``journal.jsonl``, and at the end ``prompt.safetensors``, ``result.json``, ``curve.png``. See design
sections 7 and 8.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mp2.errors import LossError
from mp2.optimizers.config import BbtConfig
from mp2.optimizers.explain import announce
from mp2.optimizers.few_shot_problem import FewShotProblem, FrozenModel, load_model, resolve_paths
from mp2.optimizers.journal import open_journal
from mp2.optimizers.provenance import check_identity, config_file, identity, versions
from mp2.optimizers.recorder import Recorder
from mp2.optimizers.report import draw_curve
from mp2.optimizers.result import run_result, score_tests, tuned_meta
from mp2.optimizers.run_folder import (
    locked,
    new_folder,
    read_config,
    resume_command,
    says_how_to_go_on,
    write_json,
    write_text,
)
from mp2.optimizers.session import one_blas_thread, sigterm_exits
from mp2.optimizers.tuned import save_tuned
from mp2.optimizers.two_stage import Progress, TwoStage

Observe = Callable[[Progress], None]


def start_run(
    config: BbtConfig, out: Path, observe: Observe = lambda p: None, model: FrozenModel | None = None
) -> dict[str, Any]:
    """Tune in a new folder under ``out``; returns the result.

    Raises:
        UsageError: bad names, files or data; nothing was made.
        LossError: no candidate of a generation had a finite loss.
    """
    problem = make_problem(config, model)
    config, card, model = problem.config, problem.card, problem.model
    announce(problem)
    run_dir = new_folder(out, f"{card.task}-{config.method(model.kind)}-seed{config.seed}")
    with locked(run_dir):
        write_text(run_dir / "card.toml", Path(card.path).read_text(encoding="utf-8"))
        write_json(run_dir / "config.json", config_file(config, model))
        return _tune(run_dir, problem, observe)


def make_problem(config: BbtConfig, model: FrozenModel | None = None) -> FewShotProblem:
    """What the config asks for, with everything resolved; raises ``UsageError`` where that is impossible."""
    from mp2.tasks import load_card

    card = load_card(config.task)
    config = resolve_paths(config)
    model = model or load_model(config)
    runtime = model.runtime
    config = replace(
        config, runtime=runtime.name, precision=runtime.precision, device=str(runtime.device)
    )
    return FewShotProblem(config, card, model)


def start_runs(
    config: BbtConfig, seeds: list[int], out: Path, observe: Callable[[], Observe]
) -> Iterator[dict[str, Any]]:
    """One run a seed, with one loaded model; yields each result as it comes."""
    configs = [replace(config, seed=seed) for seed in seeds]
    model = load_model(resolve_paths(config)) if len(seeds) > 1 else None
    for each in configs:
        yield start_run(each, out, observe(), model)


def resume_run(run_dir: Path, observe: Observe = lambda p: None) -> dict[str, Any]:
    """Go on with a run that was cut off; the result of one that has ended is read back.

    Raises:
        UsageError: no run there, another process works on it, or what it depends on has changed.
    """
    from mp2.tasks import load_card

    config = read_config(run_dir)
    with locked(run_dir):
        result_path = run_dir / "result.json"
        if result_path.exists():
            return dict(json.loads(result_path.read_text(encoding="utf-8")))
        problem = FewShotProblem(config, load_card(run_dir / "card.toml"), load_model(config))
        return _tune(run_dir, problem, observe)


def _tune(run_dir: Path, problem: FewShotProblem, observe: Observe) -> dict[str, Any]:
    """Begin, or go on where the folder's journal ends."""
    path = run_dir / "journal.jsonl"
    journal, header, records = open_journal(path, {**identity(problem), "versions": versions()})
    recorder = Recorder(journal, records)
    try:
        check_identity(path, header, identity(problem))
        with sigterm_exits(), one_blas_thread():
            driver = TwoStage(
                problem.config,
                problem.objective,
                problem.model.space(),
                problem.dev_scores,
                recorder,
                observe,
            )
            outcome = driver.run()
            tests = score_tests(problem, outcome, recorder)
    except (KeyboardInterrupt, SystemExit, LossError):
        close = getattr(observe, "close", None)
        if close:
            close()
        print(
            f"mp2: stopped at iteration {recorder.iteration}; go on with: {resume_command(run_dir)}",
            file=sys.stderr,
        )
        raise
    finally:
        journal.close()
    result = run_result(run_dir, problem, outcome, recorder, tests)
    title = f"{result['task']}  {result['method']}  seed {result['seed']}"
    with says_how_to_go_on(run_dir):
        save_tuned(run_dir / "prompt.safetensors", outcome.final.z, tuned_meta(problem, outcome))
        draw_curve(run_dir / "curve.png", outcome, title, problem.card.metric)
        write_json(run_dir / "result.json", result)  # last: it says that the run has ended
    return result

"""A gradient-tuning run: a folder like that of ``mp2 bbt``, which ``mp2 predict`` reads too.

``tune.json`` (what was asked for), ``card.toml``, and at the end ``prompts.safetensors`` (the selected soft
prompts), ``prompt.safetensors`` (their mixture), ``config.json`` (how to load both), ``curve.json`` and
``curve.png``, ``result.json``. A run takes minutes and keeps no checkpoint: one that was cut off is started
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from mp2.errors import UsageError
from mp2.files import write_json, write_text
from mp2.limits import check_new_folder
from mp2.optimizers.config import RouterConfig
from mp2.optimizers.two_stage import Checkpoint
from mp2.prompts import save_prompts
from mp2.runs.baselines import baseline_facts
from mp2.runs.config import BbtConfig
from mp2.runs.curve import CURVE, draw_curve, write_curve
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.frozen_model import FrozenModel, load_model, resolve_paths
from mp2.runs.journal import finite_or_none
from mp2.runs.loggers.logger import Logger, RunStart
from mp2.runs.provenance import config_file, identity, versions
from mp2.runs.result import (
    calibration_facts,
    engine_facts,
    router_text,
    stage_scores,
    temperature_of,
)
from mp2.runs.run_folder import OWN_PROMPTS, locked, new_folder
from mp2.runs.scratch import ON_THE_FLY
from mp2.runs.tuned import TunedMeta, save_tuned
from mp2.tasks import load_card
from mp2.training.config import TuneConfig
from mp2.training.tune import GradientTuner, TuneOutcome


def start_tune(
    config: TuneConfig, out: Path, logger: Logger | None = None, model: FrozenModel | None = None
) -> dict[str, Any]:
    """Tune in a new folder under ``out``; returns the result, with the keys of a black-box result.

    ``logger`` follows the run (`mp2.runs.loggers`).

    Raises:
        UsageError: bad names, files or data; nothing was made.
        LossError: a loss was not finite.
    """
    check_new_folder(out)
    card = load_card(config.run.task)
    run = resolve_paths(replace(config.run, router=RouterConfig(method="none"), head="span"))
    model = injected(model or _load(run), config.injection)
    run = replace(run, runtime=model.runtime.name, precision=model.runtime.precision)
    config = replace(config, run=run)
    problem = FewShotProblem(run, card, model)
    run_dir = new_folder(out, f"{card.task}-{config.method(model.kind)}-seed{run.seed}").resolve()
    with locked(run_dir):
        write_text(run_dir / "card.toml", Path(card.path).read_text(encoding="utf-8"))
        write_json(run_dir / "tune.json", {"config": asdict(config), "versions": versions()})
        logger = logger or Logger()
        logger.start(_begun(run_dir, config, problem))
        try:
            tuner = GradientTuner(config, problem, logger)
            outcome = tuner.run()
            result = _result(run_dir, config, tuner, outcome)
        except BaseException:
            logger.end(None)
            raise
        _write(run_dir, tuner, outcome, result)
        logger.end(result)
    return result


def _begun(run_dir: Path, config: TuneConfig, problem: FewShotProblem) -> RunStart:
    model = problem.model
    return RunStart(
        run_dir=run_dir,
        task=problem.card.task,
        method=config.method(model.kind),
        seed=config.run.seed,
        backbone=model.backbone.config.name,
        config=asdict(config),
    )


def injected(model: FrozenModel, injection: Literal["prefix", "inline"] | None) -> FrozenModel:
    """The model with its prompts injected so; None: as their file says.

    Raises:
        UsageError: a prefix of shallow prompts.
    """
    prompts = model.prompts
    if injection in (None, prompts.meta.injection):
        return model
    if prompts.kind == "shallow":
        raise UsageError("injection is 'prefix', but shallow prompts are always inline: drop --injection")
    return replace(model, prompts=replace(prompts, meta=replace(prompts.meta, injection=injection)))


def _load(run: BbtConfig) -> FrozenModel:
    """The model; raises ``UsageError`` where no prompts were named for a backbone that has none."""
    if run.prompts in ON_THE_FLY:
        raise UsageError(
            f"no prompts were named for backbone '{run.backbone}': give --prompts FILE (mp2 pretrain makes "
            "one, mp2 scratch an untrained one with another's span head); 'mp2 bbt' needs none"
        )
    return load_model(run)


def start_tunes(
    config: TuneConfig, seeds: list[int], out: Path, logger: Callable[[], Logger] = Logger
) -> Iterator[dict[str, Any]]:
    """One run a seed, with one loaded model; yields each result as it comes."""
    model = _load(resolve_paths(config.run))
    for seed in seeds:
        yield start_tune(replace(config, run=replace(config.run, seed=seed)), out, logger(), model)


def _write(run_dir: Path, tuner: GradientTuner, outcome: TuneOutcome, result: dict[str, Any]) -> None:
    problem, final = tuner.problem, outcome.stages.final
    save_prompts(outcome.prompts, run_dir / OWN_PROMPTS)
    meta = TunedMeta(
        task=problem.card.task,
        kind=problem.model.kind,
        backbone=problem.model.backbone.config.name,
        backbone_sha256=problem.model.backbone.sha256,
        prompts=OWN_PROMPTS,
        prompts_sha256=outcome.prompts.sha256,
        router=result["router"],
        card=Path(problem.card.path).read_text(encoding="utf-8"),
        max_tokens=problem.max_tokens,
        at=final.at,
        iteration=final.iteration,
        seed=problem.config.seed,
        temperature=temperature_of(final),
    )
    save_tuned(run_dir / "prompt.safetensors", final.z, meta)
    tuned: BbtConfig = replace(problem.config, prompts=OWN_PROMPTS)
    write_json(run_dir / "config.json", config_file(tuned, problem.model))
    write_curve(run_dir / CURVE, outcome.stages)
    draw_curve(run_dir / "curve.png", outcome.stages, result)
    write_json(run_dir / "result.json", result)  # last: it says that the run has ended


def _result(run_dir: Path, config: TuneConfig, tuner: GradientTuner, outcome: TuneOutcome) -> dict[str, Any]:
    problem, model, found = tuner.problem, tuner.problem.model, outcome.stages
    stages: dict[str, Checkpoint] = {"untuned": found.untuned, "stage1": found.stage1}
    if not config.run.router_only:
        stages["stage2"] = found.final
    tests, n_tests, tested_s = tuner.test_scores(stages, outcome.prompts) if config.run.test else ({}, 0, 0.0)
    seconds, last = outcome.seconds, tests.get(list(stages)[-1])
    return {
        "task": problem.card.task,
        "method": config.method(model.kind),
        "seed": config.run.seed,
        "backbone": model.backbone.config.name,
        "backbone_revision": model.backbone.revision,
        "injection": model.prompts.meta.injection,
        "iterations": found.loss_curve[-1][0],
        "train_loss": finite_or_none(found.final.train_loss),
        "dev_score": found.final.dev_score,
        "test_score": last and last.score,
        "test_exact_match": last and last.exact_match,
        "metric": problem.card.metric,
        "seconds": {
            "stage1": seconds["stage1"],
            "stage2": seconds["stage2"],
            "forward": seconds["stage1"] + seconds["stage2"],
            "suggest": 0.0,
            "journal": 0.0,
            "other": 0.0,
            "dev": seconds["dev"],
            "test": tested_s,
        },
        "engine": engine_facts(model),
        "run_dir": str(run_dir),
        "router_search": "adam",
        "router": router_text(found.final.router),
        "best_train_loss": finite_or_none(found.incumbent_loss),
        "selected": {"at": found.final.at, "iteration": found.final.iteration},
        "stages": stage_scores(stages, tests),
        "evaluations": {"train": found.loss_curve[-1][0], "dev": outcome.n_dev, "test": n_tests},
        "examples": {"train": problem.n_train, "dev": problem.n_dev, "test": problem.n_test if tests else 0},
        "non_finite_losses": 0,
        **baseline_facts(problem, found.final.dev_score, None if last is None else last.score),
        "calibration": calibration_facts(problem, found.final, last),
        "provenance": {**identity(problem), "config_sha256": config.sha256(), "versions": versions()},
    }

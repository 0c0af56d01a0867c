"""A gradient-tuning run: a folder like that of ``mp2 bbt``, which ``mp2 predict`` reads too.

``tune.json`` (what was asked for), ``card.toml``, and at the end ``prompts.safetensors`` (the selected soft
prompts), ``prompt.safetensors`` (their mixture), ``config.json`` (how to load both), ``curve.json`` and
``curve.png``, ``result.json``; after model tuning also ``backbone``, the tuned one. A run takes minutes and
keeps no checkpoint: one that was cut off is started again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mp2.backbone import save_backbone
from mp2.errors import UsageError
from mp2.files import write_json, write_text
from mp2.injection import Injection
from mp2.limits import check_new_folder
from mp2.optimizers.config import RouterConfig
from mp2.optimizers.two_stage import Checkpoint, Observer
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
from mp2.runs.run_folder import OWN_BACKBONE, OWN_PROMPTS, locked, new_folder
from mp2.runs.scratch import ON_THE_FLY
from mp2.runs.tuned import TunedMeta, save_tuned
from mp2.tasks import load_card
from mp2.training.config import TuneConfig, check_injection
from mp2.training.methods import METHODS
from mp2.training.methods.method import first_prompt
from mp2.training.soft_prompt import SoftPromptTuner
from mp2.training.tune import GradientTuner
from mp2.training.tuner import TuneOutcome, Tuner


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
    model = _of_method(model or _load(config), config)
    run = replace(run, runtime=model.backend.name, precision=model.backend.precision)
    own = config.method != "mp2" and config.run.prompts is None  # prompts that the method makes
    config = replace(config, run=replace(run, prompts=None) if own else run)
    problem = FewShotProblem(run, card, model)
    label = config.label(model.kind, _made_by(model))
    run_dir = new_folder(out, f"{card.task}-{label}-seed{run.seed}").resolve()
    with locked(run_dir):
        write_text(run_dir / "card.toml", Path(card.path).read_text(encoding="utf-8"))
        write_json(run_dir / "tune.json", {"config": asdict(config), "versions": versions()})
        logger = logger or Logger()
        logger.start(_begun(run_dir, config, problem))
        try:
            tuner = _tuner(config, problem, logger)
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
        method=config.label(model.kind, _made_by(model)),
        seed=config.run.seed,
        backbone=model.backbone.config.name,
        config=asdict(config),
    )


def injected(model: FrozenModel, injection: Injection | None) -> FrozenModel:
    """The model with its prompts injected so; None: as their file says.

    Raises:
        UsageError: a way that prompts of this kind do not have.
    """
    prompts = model.prompts
    if injection in (None, prompts.meta.injection):
        return model
    check_injection(prompts.kind, injection)
    return replace(model, prompts=replace(prompts, meta=replace(prompts.meta, injection=injection)))


def _tuner(config: TuneConfig, problem: FewShotProblem, observer: Observer) -> Tuner:
    if config.method == "mp2":
        return GradientTuner(config, problem, observer)
    return SoftPromptTuner(config, METHODS[config.method], problem, observer)


def _made_by(model: FrozenModel) -> str | None:
    """The method of ``mp2 pretrain`` that made a single soft prompt; None: none did."""
    made = model.prompts.meta.provenance
    found: str | None = made.get("method") if made.get("made_by") == "mp2 pretrain" else None
    return found


def _of_method(model: FrozenModel, config: TuneConfig) -> FrozenModel:
    """The model with the prompts that the method starts from.

    Raises:
        UsageError: a method that cannot start from these prompts.
    """
    meta = model.prompts.meta
    if config.method == "mp2":
        alone = meta.n_modules == 1 and meta.router_normalisation == "sum"
        if alone and config.router_epochs != 0:
            raise UsageError(
                f"the prompts {config.run.prompts} have one module, which a router divided by its sum cannot "
                "change: give --method prompt-tuning, or --router-epochs 0"
            )
        return injected(model, config.injection)
    if config.run.prompts is not None:
        if not (meta.is_single and meta.kind == "shallow" and meta.prompt_tokens):
            raise UsageError(
                f"method {config.method} starts from one soft prompt, and {config.run.prompts} has "
                f"{meta.kind} prompts of {meta.n_modules} modules: drop --prompts, or give those of "
                "'mp2 pretrain --method spot' or ppt"
            )
        return model
    method = METHODS[config.method]
    start = first_prompt(method, model.backbone, config.prompt_tokens, config.run.seed)
    return replace(model, prompts=start)


def _load(config: TuneConfig) -> FrozenModel:
    """The model; raises ``UsageError`` where no prompts were named for a backbone that has none."""
    run = resolve_paths(config.run)
    if config.method != "mp2" and config.run.prompts is None:
        run = replace(run, prompts="scratch-shallow")  # not used: the method makes its own
    elif run.prompts in ON_THE_FLY:
        raise UsageError(
            f"no prompts were named for backbone '{run.backbone}': give --prompts FILE (mp2 pretrain makes "
            "one, mp2 scratch an untrained one with another's span head); 'mp2 bbt' needs none"
        )
    return load_model(run)


def start_tunes(
    config: TuneConfig, seeds: list[int], out: Path, logger: Callable[[], Logger] = Logger
) -> Iterator[dict[str, Any]]:
    """One run a seed, with one loaded model; yields each result as it comes."""
    model = _load(config)
    for seed in seeds:
        yield start_tune(replace(config, run=replace(config.run, seed=seed)), out, logger(), model)


def _write(run_dir: Path, tuner: Tuner, outcome: TuneOutcome, result: dict[str, Any]) -> None:
    problem, final = tuner.problem, outcome.stages.final
    save_prompts(outcome.prompts, run_dir / OWN_PROMPTS)
    if outcome.backbone is not None:
        save_backbone(outcome.backbone, run_dir / OWN_BACKBONE)
    backbone = outcome.backbone or problem.model.backbone
    meta = TunedMeta(
        task=problem.card.task,
        kind=problem.model.kind,
        backbone=backbone.config.name,
        backbone_sha256=backbone.sha256,
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


def _result(run_dir: Path, config: TuneConfig, tuner: Tuner, outcome: TuneOutcome) -> dict[str, Any]:
    problem, model, found = tuner.problem, tuner.problem.model, outcome.stages
    stages: dict[str, Checkpoint] = {"untuned": found.untuned}
    if config.method == "mp2":
        stages["stage1"] = found.stage1
    if not config.run.router_only:
        stages["stage2"] = found.final
    tests, n_tests, tested_s = tuner.test_scores(stages, outcome.prompts) if config.run.test else ({}, 0, 0.0)
    seconds, last = outcome.seconds, tests.get(list(stages)[-1])
    return {
        "task": problem.card.task,
        "method": config.label(model.kind, _made_by(model)),
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
        "router_search": "adam" if config.method == "mp2" else "none",
        "learning_rate": outcome.rate,
        "router": router_text(found.final.router),
        "best_train_loss": finite_or_none(found.incumbent_loss),
        "selected": {"at": found.final.at, "iteration": found.final.iteration},
        "stages": stage_scores(stages, tests),
        "evaluations": {"train": found.loss_curve[-1][0], "dev": outcome.n_dev, "test": n_tests},
        "examples": {"train": problem.n_train, "dev": problem.n_dev, "test": problem.n_test if tests else 0},
        "non_finite_losses": 0,
        **baseline_facts(
            problem, found.final.dev_score, None if last is None else last.score, longer="--epochs"
        ),
        "calibration": calibration_facts(problem, found.final, last),
        "provenance": {**identity(problem), "config_sha256": config.sha256(), "versions": versions()},
    }

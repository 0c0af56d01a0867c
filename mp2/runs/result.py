"""What a run found: scores on test, ``result.json``, the metadata of its tuned prompt; a result read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mp2.json_files import Fields, check, null_or, number, object_of, read_object, text, whole
from mp2.optimizers.router_search import Routers
from mp2.optimizers.two_stage import Checkpoint, Outcome, Scores
from mp2.runs.baselines import baseline_facts
from mp2.runs.config import BbtConfig
from mp2.runs.journal import finite_or_none
from mp2.runs.provenance import identity, versions
from mp2.runs.recorder import Recorder
from mp2.runs.tuned import TunedMeta, head_settings, load_tuned

if TYPE_CHECKING:
    from mp2.heads import Head
    from mp2.runs.few_shot_problem import FewShotProblem
    from mp2.runs.frozen_model import FrozenModel


# what everybody who reads a result relies on
_SCORE, _LOSS = null_or(number(0, 1)), null_or(number())
_STAGE = {"train_loss": _LOSS, "dev_score": _SCORE, "test_score": _SCORE}
_RESULT = Fields(
    {
        **dict.fromkeys(("task", "method", "backbone", "metric", "run_dir", "router_search"), text),
        **dict.fromkeys(("seed", "iterations", "non_finite_losses"), whole()),
        **_STAGE,
        "seconds": Fields(
            dict.fromkeys(
                ("stage1", "stage2", "forward", "suggest", "journal", "other", "dev", "test"), number(0)
            )
        ),
        "engine": Fields(dict.fromkeys(("runtime", "precision", "device"), text)),
        "selected": Fields({"at": text}),
        "stages": object_of(Fields(_STAGE)),
    }
)


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The result of a run that has ended; None: there is none yet.

    Raises:
        FormatError: it, or the tuned prompt, cannot be read; the message names file and field.
    """
    path = run_dir / "result.json"
    if not path.exists():
        return None
    result: dict[str, Any] = check(read_object(path), _RESULT, path)
    load_tuned(run_dir / "prompt.safetensors")
    return result


def score_tests(problem: FewShotProblem, outcome: Outcome, recorder: Recorder) -> dict[str, Scores]:
    """Test scores of each stage's prompt, each prompt once; empty with ``--no-test``.

    Probabilities are those of the temperature that dev gave the prompt.
    """
    if not problem.config.test:
        return {}
    scores: dict[str, Scores] = {}
    known: dict[bytes, Scores] = {}
    for name, checkpoint in _stages(problem.config, outcome).items():
        key = checkpoint.z.tobytes()
        if key not in known:
            z, temperature = checkpoint.z, temperature_of(checkpoint)
            known[key] = recorder.scores(
                "test",
                name,
                z,
                lambda z=z, t=temperature: problem.test_scores(z, t),  # type: ignore[misc]
            )
        scores[name] = known[key]
    return scores


def temperature_of(checkpoint: Checkpoint) -> float:
    """The temperature that dev gave a prompt's scores; 1 without a dev set."""
    found = None if checkpoint.dev is None else checkpoint.dev.calibration
    return 1.0 if found is None else float(found["temperature"])


def calibration_facts(problem: FewShotProblem, final: Checkpoint, test: Scores | None) -> dict[str, Any]:
    """What ``result.json`` says of the selected prompt's probabilities.

    ``by`` is what the temperature was fitted to: dev, the training examples each left out (the ridge head
    without a dev set), or nothing.
    """
    from mp2.tasks.calibration import N_BINS

    on_dev = None if final.dev is None else final.dev.calibration
    by = "dev" if on_dev else "leave-one-out" if problem.head.kind == "ridge" else None

    def errors(found: Mapping[str, float] | None) -> dict[str, float] | None:
        return None if found is None else {name: found[name] for name in found if name != "temperature"}

    return {
        "temperature": temperature_of(final),
        "by": by,
        "bins": N_BINS,
        "dev": errors(on_dev),
        "test": errors(None if test is None else test.calibration),
    }


def _stages(config: BbtConfig, outcome: Outcome) -> dict[str, Checkpoint]:
    stages = {"untuned": outcome.untuned, "stage1": outcome.stage1}
    return stages if config.router_only else {**stages, "stage2": outcome.final}


def run_result(
    run_dir: Path, problem: FewShotProblem, outcome: Outcome, recorder: Recorder, tests: dict[str, Scores]
) -> dict[str, Any]:
    """What ``result.json`` holds."""
    config, model, final = problem.config, problem.model, outcome.final
    stages = _stages(config, outcome)
    final_test = next((tests[name] for name, c in stages.items() if c is final and tests), None)
    return {
        "task": problem.card.task,
        "method": config.label(model.kind),
        "seed": config.seed,
        "backbone": model.backbone.config.name,
        "backbone_revision": model.backbone.revision,
        "iterations": recorder.iteration,
        "train_loss": final.train_loss,
        "dev_score": final.dev_score,
        "test_score": final_test and final_test.score,
        "test_exact_match": final_test and final_test.exact_match,
        "metric": problem.card.metric,
        "seconds": run_seconds(recorder.seconds),
        "engine": engine_facts(model),
        "run_dir": str(run_dir),
        "router_search": config.router.method,
        "router": router_text(final.router),
        "best_train_loss": outcome.incumbent_loss,
        "selected": {"at": final.at, "iteration": final.iteration},
        "stages": stage_scores(stages, tests),
        "evaluations": dict(recorder.counts),
        "examples": {"train": problem.n_train, "dev": problem.n_dev, "test": problem.n_test if tests else 0},
        "non_finite_losses": recorder.n_non_finite,
        **baseline_facts(problem, final.dev_score, None if final_test is None else final_test.score),
        "calibration": calibration_facts(problem, final, final_test),
        "head": problem.head.as_dict(),
        "provenance": {**identity(problem), "versions": versions()},
    }


def run_seconds(seconds: dict[str, float]) -> dict[str, float]:
    """The result's seconds from the recorder's: what each stage took, and what for.

    ``stage1`` + ``stage2`` = ``forward`` + ``suggest`` + ``journal`` + ``other``; these, ``dev`` and ``test``
    make up the run's time. ``load`` is what came before the first evaluation of the last session.
    """
    wall = ("forward", "suggest", "journal", "other")
    stages = {f"stage{stage}": sum(seconds[f"{name}{stage}"] for name in wall) for stage in (1, 2)}
    parts = {name: seconds[f"{name}1"] + seconds[f"{name}2"] for name in wall}
    return {**stages, **parts, **{name: seconds[name] for name in ("dev", "test", "load")}}


def engine_facts(model: FrozenModel) -> dict[str, str]:
    """What computed the losses."""
    runtime = model.backend
    return {"runtime": runtime.name, "precision": runtime.precision, "device": str(runtime.device)}


def stage_scores(stages: Mapping[str, Checkpoint], tests: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """Losses, scores and router of each stage's prompt; ``tests`` has the test scores that are known.

    ``test_exact_match`` is null but for extraction.
    """
    return {
        name: {
            "iteration": c.iteration,
            "train_loss": finite_or_none(c.train_loss),
            "dev_score": c.dev_score,
            "dev_loss": None if c.dev is None else finite_or_none(c.dev.loss),
            "test_score": tests[name].score if name in tests else None,
            "test_exact_match": tests[name].exact_match if name in tests else None,
            "router": router_text(c.router),
        }
        for name, c in stages.items()
    }


def router_text(router: Routers) -> list[str]:
    """A router bool [L, K] as a text of 0 and 1 a layer."""
    return ["".join("1" if bit else "0" for bit in layer) for layer in router]


def tuned_meta(problem: FewShotProblem, outcome: Outcome, head: Head) -> TunedMeta:
    """Where the selected prompt comes from; ``head`` is fitted under it."""
    model = problem.model
    return TunedMeta(
        task=problem.card.task,
        kind=model.kind,
        backbone=model.backbone.config.name,
        backbone_sha256=model.backbone.sha256,
        prompts=str(problem.config.prompts),
        prompts_sha256=model.prompts.sha256,
        router=router_text(outcome.final.router),
        card=Path(problem.card.path).read_text(encoding="utf-8"),
        max_tokens=problem.max_tokens,
        at=outcome.final.at,
        iteration=outcome.final.iteration,
        seed=problem.config.seed,
        head=problem.head.as_dict() | head_settings(head),
        temperature=temperature_of(outcome.final),
    )

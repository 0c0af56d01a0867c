"""A run: one folder that holds everything of it, made, locked, resumed and finished here.

``config.json`` (with what was resolved and the versions), ``card.toml`` (the task card as it was),
``journal.jsonl``, and at the end ``prompt.safetensors``, ``result.json``, ``curve.png``. See design
sections 7 and 8.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

from mp2.errors import FormatError, LossError, MismatchError, Mp2Error, RunLockedError, UsageError
from mp2.optimizers.config import SCHEMA_VERSION, BbtConfig
from mp2.optimizers.few_shot_problem import (
    FewShotProblem,
    FrozenModel,
    identity,
    load_model,
    resolve_paths,
)
from mp2.optimizers.journal import finite_or_none, open_journal
from mp2.optimizers.recorder import Recorder
from mp2.optimizers.report import draw_curve
from mp2.optimizers.tuned import TunedMeta, save_tuned
from mp2.optimizers.two_stage import Checkpoint, Outcome, Progress, TwoStage

Observe = Callable[[Progress], None]
_VERSIONS = ("mp2", "numpy", "torch", "onnxruntime", "cma", "nevergrad", "bayesian-optimization")


def start_run(
    config: BbtConfig, out: Path, observe: Observe = lambda p: None, model: FrozenModel | None = None
) -> dict[str, Any]:
    """Tune in a new folder under ``out``; returns the result.

    Raises:
        UsageError: bad names, files or data; nothing was made.
        LossError: no candidate of a generation had a finite loss.
    """
    from mp2.tasks import load_card

    card = load_card(config.task)
    config = resolve_paths(config)
    model = model or load_model(config)
    config = replace(config, runtime=model.runtime.name, precision=model.runtime.precision)
    problem = FewShotProblem(config, card, model)
    run_dir = _new_folder(out, f"{card.task}-{config.method(model.kind)}-seed{config.seed}")
    with _locked(run_dir):
        _write(run_dir / "card.toml", Path(card.path).read_text(encoding="utf-8"))
        _write_json(run_dir / "config.json", _config_file(config, model))
        return _tune(run_dir, problem, observe)


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
    with _locked(run_dir):
        result_path = run_dir / "result.json"
        if result_path.exists():
            return dict(json.loads(result_path.read_text(encoding="utf-8")))
        problem = FewShotProblem(config, load_card(run_dir / "card.toml"), load_model(config))
        return _tune(run_dir, problem, observe)


def read_config(run_dir: Path) -> BbtConfig:
    """The config of a run folder."""
    path = run_dir / "config.json"
    if not path.exists():
        raise UsageError(f"{run_dir} is not a run folder: there is no config.json in it")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"not JSON: {error}", path=path) from error
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
        raise FormatError(f"expected schema_version {SCHEMA_VERSION}", path=path, field="schema_version")
    return BbtConfig.from_json(values.get("config", {}), path)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results can depend on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _tune(run_dir: Path, problem: FewShotProblem, observe: Observe) -> dict[str, Any]:
    """Begin, or go on where the folder's journal ends."""
    path = run_dir / "journal.jsonl"
    journal, header, records = open_journal(path, {**identity(problem), "versions": versions()})
    recorder = Recorder(journal, records)
    try:
        _check_identity(path, header, identity(problem))
        with _sigterm_exits(), _one_blas_thread():
            driver = TwoStage(
                problem.config,
                problem.objective,
                problem.model.space(),
                problem.dev_scores,
                recorder,
                observe,
            )
            outcome = driver.run()
            tests = _test_scores(problem, outcome, recorder)
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
    result = _result(run_dir, problem, outcome, recorder, tests)
    title = f"{result['task']}  {result['method']}  seed {result['seed']}"
    with _says_how_to_go_on(run_dir):
        save_tuned(run_dir / "prompt.safetensors", outcome.final.z, _tuned_meta(problem, outcome))
        draw_curve(run_dir / "curve.png", outcome, title, problem.card.metric)
        _write_json(run_dir / "result.json", result)  # last: it says that the run has ended
    return result


def resume_command(run_dir: Path) -> str:
    """What to type to go on."""
    return f"mp2 bbt --resume {run_dir}"


def _test_scores(problem: FewShotProblem, outcome: Outcome, recorder: Recorder) -> dict[str, float]:
    """Test score of each stage's prompt, each prompt once; empty with ``--no-test``."""
    if not problem.config.test:
        return {}
    scores: dict[str, float] = {}
    known: dict[bytes, float] = {}
    for name, checkpoint in _stages(problem.config, outcome).items():
        key = checkpoint.z.tobytes()
        if key not in known:
            z = checkpoint.z
            known[key] = recorder.scores("test", name, z, lambda z=z: problem.test_scores(z)).score  # type: ignore[misc]
        scores[name] = known[key]
    return scores


def _stages(config: BbtConfig, outcome: Outcome) -> dict[str, Checkpoint]:
    stages = {"untuned": outcome.untuned, "stage1": outcome.stage1}
    return stages if config.router_only else {**stages, "stage2": outcome.final}


def _result(
    run_dir: Path, problem: FewShotProblem, outcome: Outcome, recorder: Recorder, tests: dict[str, float]
) -> dict[str, Any]:
    config, model, seconds, final = problem.config, problem.model, recorder.seconds, outcome.final
    stages = _stages(config, outcome)
    final_test = next((tests[name] for name, c in stages.items() if c is final and tests), None)
    return {
        "task": problem.card.task,
        "method": config.method(model.kind),
        "seed": config.seed,
        "backbone": model.backbone.config.name,
        "iterations": recorder.iteration,
        "train_loss": final.train_loss,
        "dev_score": final.dev.score,
        "test_score": final_test,
        "metric": problem.card.metric,
        "seconds": {
            "stage1": seconds["forward1"] + seconds["suggest1"],
            "stage2": seconds["forward2"] + seconds["suggest2"],
            "forward": seconds["forward1"] + seconds["forward2"],
            "suggest": seconds["suggest1"] + seconds["suggest2"],
            "suggest_hidden": seconds["suggest_hidden"],
            "dev": seconds["dev"],
            "test": seconds["test"],
        },
        "engine": {
            "runtime": model.runtime.name,
            "precision": model.runtime.precision,
            "device": str(model.runtime.device),
        },
        "run_dir": str(run_dir),
        "router_search": config.router.method,
        "router": _router_text(outcome),
        "best_train_loss": outcome.incumbent_loss,
        "selected": {"at": final.at, "iteration": final.iteration},
        "stages": {
            name: {
                "iteration": c.iteration,
                "train_loss": finite_or_none(c.train_loss),
                "dev_score": c.dev.score,
                "dev_loss": finite_or_none(c.dev.loss),
                "test_score": tests.get(name),
            }
            for name, c in stages.items()
        },
        "evaluations": dict(recorder.counts),
        "examples": {"train": problem.n_train, "dev": problem.n_dev, "test": problem.n_test if tests else 0},
        "non_finite_losses": recorder.n_non_finite,
        "provenance": {**identity(problem), "versions": versions()},
    }


def _router_text(outcome: Outcome) -> list[str]:
    return ["".join("1" if bit else "0" for bit in layer) for layer in outcome.router]


def _tuned_meta(problem: FewShotProblem, outcome: Outcome) -> TunedMeta:
    model = problem.model
    return TunedMeta(
        task=problem.card.task,
        kind=model.kind,
        backbone=model.backbone.config.name,
        backbone_sha256=model.backbone.sha256,
        prompts=str(problem.config.prompts),
        prompts_sha256=model.prompts.sha256,
        router=_router_text(outcome),
        card=Path(problem.card.path).read_text(encoding="utf-8"),
        max_tokens=problem.max_tokens,
        at=outcome.final.at,
        iteration=outcome.final.iteration,
        seed=problem.config.seed,
    )


def _config_file(config: BbtConfig, model: FrozenModel) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "config": config.to_json(),
        "config_sha256": config.sha256(),
        "runtime_reason": model.runtime.reason,
        "versions": versions(),
    }


def _check_identity(path: Path, recorded: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if recorded.get(name) != value:
            raise MismatchError(
                f"{path} was written with {name} {str(recorded.get(name))[:16]}, got {str(value)[:16]}: "
                "what the run depends on has changed; put it back, or start a new run"
            )
    current = versions()
    changed = {n: v for n, v in recorded.get("versions", {}).items() if current.get(n) != v}
    if changed:
        was = ", ".join(f"{n} {v} (now {current.get(n, 'missing')})" for n, v in changed.items())
        print(f"mp2: the run was begun with {was}; the result may differ in the last bits", file=sys.stderr)


def _new_folder(out: Path, name: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        run_dir = out / (f"{name}-{stamp}" + (f"-{attempt}" if attempt else ""))
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(
                f"cannot make the run folder {run_dir}: {error.strerror}; give another --out"
            ) from error
        return run_dir
    raise UsageError(f"1000 runs named {name}-{stamp} are in {out} already; give another --out")


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder's lock; the system drops it with the process, however that ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(run_dir / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunLockedError(
            f"another process works in {run_dir}; wait for it, or stop it and resume the run"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _says_how_to_go_on(run_dir: Path) -> Iterator[None]:
    """A full disk at the very end loses nothing either: the journal is whole."""
    try:
        yield
    except OSError as error:
        raise Mp2Error(
            f"cannot write {error.filename or run_dir}: {error.strerror or error}. All iterations are "
            f"journaled: make room, then write the results with: {resume_command(run_dir)}"
        ) from error


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM becomes ``SystemExit(143)``, so that it ends a run as tidily as Ctrl-C does."""

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, on_sigterm)
    except ValueError:  # not the main thread: whoever owns it decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """CMA-ES at d = 300 is faster with one thread, and its sums then never depend on the number of cores."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(limits=1, user_api="blas"):
        yield


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    _write(path, json.dumps(values, ensure_ascii=False, indent=2, allow_nan=False) + "\n")

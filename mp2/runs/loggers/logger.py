"""The four calls that a run makes while it is under way, and who gets them.

::

    class Printer(Logger):
        def checkpoint(self, checkpoint, progress):
            print(checkpoint.iteration, checkpoint.dev_score)

    start_run(config, "runs", logger=Printer())

Each run has a logger of its own. A run that is cut off and resumed is replayed from its journal: its logger
hears of everything again, with ``progress.live`` false.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mp2.errors import MissingDependencyError, UnknownNameError
from mp2.messages import say
from mp2.optimizers.two_stage import Checkpoint, Observer, Progress

LOGGERS = {"tensorboard": "train", "mlflow": "mlflow", "wandb": "wandb"}
"""Names of loggers, and the extra of mp2 that has what each needs."""


@dataclass(frozen=True)
class RunStart:
    """A run that begins, or goes on; ``config`` is what was asked for, as JSON values."""

    run_dir: Path
    task: str
    method: str
    seed: int
    backbone: str
    config: Mapping[str, Any]


class Logger(Observer):
    """Follows one run; does nothing: a logger has those of the four methods that it needs.

    ``iteration`` (after each generation) and ``checkpoint`` (a prompt was scored on dev) are called in the
    run's own thread.
    """

    def start(self, run: RunStart) -> None:
        """The run's folder is there, nothing is evaluated yet."""

    def end(self, result: Mapping[str, Any] | None) -> None:
        """The run has ended with ``result`` (``result.json``); None: it was stopped, and may be resumed."""


class Several(Logger):
    """Tells several loggers. One that fails is told no more, which is said: no run is lost for its log."""

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self._loggers = dict(loggers)

    def start(self, run: RunStart) -> None:
        """Pass it on."""
        self._tell(lambda logger: logger.start(run))

    def iteration(self, progress: Progress) -> None:
        """Pass it on."""
        self._tell(lambda logger: logger.iteration(progress))

    def checkpoint(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Pass it on."""
        self._tell(lambda logger: logger.checkpoint(checkpoint, progress))

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Pass it on."""
        self._tell(lambda logger: logger.end(result))

    def _tell(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                call(logger)
            except Exception as error:
                del self._loggers[name]
                why = " ".join(str(error).split())[:200]
                say(f"the run goes on without {name}: {type(error).__name__}: {why}")


def create_loggers(names: Sequence[str], line: Callable[[], Logger] | None = None) -> Callable[[], Logger]:
    """What makes a logger for each run: those named, and one of ``line``, the progress line, if given.

    Raises:
        UnknownNameError: no such logger.
        MissingDependencyError: its package is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise UnknownNameError("logger", name, LOGGERS)
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"--log {name}: the package is not installed; pip install 'mp2[{LOGGERS[name]}]'"
            )

    def create() -> Logger:
        from mp2.runs.loggers.mlflow import MlflowLogger
        from mp2.runs.loggers.tensorboard import TensorBoardLogger
        from mp2.runs.loggers.wandb import WandbLogger

        kinds: dict[str, type[Logger]] = {
            "tensorboard": TensorBoardLogger,
            "mlflow": MlflowLogger,
            "wandb": WandbLogger,
        }
        loggers = {name: kinds[name]() for name in names}
        return Several(loggers | ({} if line is None else {"the progress line": line()}))

    return create


def of_progress(progress: Progress) -> dict[str, float]:
    """What is logged of a generation, by name; finite values only."""
    return finite({"train/loss": progress.train_loss, "train/generation_loss": progress.generation_loss})


def of_checkpoint(checkpoint: Checkpoint) -> dict[str, float]:
    """What is logged of a prompt that was scored, by name: nothing without a dev set; finite values only."""
    dev = checkpoint.dev
    return {} if dev is None else finite({"dev/score": dev.score, "dev/loss": dev.loss})


def of_result(result: Mapping[str, Any]) -> dict[str, float]:
    """What is logged at the end, by name: test scores of the stages, dev and test scores of the baselines."""
    values = {f"test/{stage}": found["test_score"] for stage, found in result["stages"].items()}
    values |= {"final/dev": result["dev_score"], "final/test": result["test_score"]}
    for key, line in (result["baselines"] or {}).items():
        values |= {f"baselines/{split}/{key}": line[f"{split}_score"] for split in ("dev", "test")}
    return finite({name: value for name, value in values.items() if value is not None})


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config without configs in it: ``{"router": {"method": ...}}`` becomes ``{"router.method": ...}``."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Those of the values that are finite."""
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}

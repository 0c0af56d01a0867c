"""A run in MLflow: parameters, metrics, at the end ``result.json`` and the curve.

``MLFLOW_TRACKING_URI`` says where; without it, files in ``mlruns`` beside the run's folder, and no network.
A resumed run goes on under its id, which ``mlflow.json`` in its folder keeps.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from mp2.errors import FormatError
from mp2.files import write_json
from mp2.json_files import Fields, check, one_line, read_object
from mp2.optimizers.two_stage import Checkpoint, Progress
from mp2.runs.loggers.logger import Logger, RunStart, flat, of_checkpoint, of_progress, of_result

EXPERIMENT = "mp2"  # MLFLOW_EXPERIMENT_NAME names another
EVERY_S = 2.0  # metrics are sent together: a server's answer may take as long as a generation
_SERIES = ("train/generation_loss", "dev/score")  # one is in whatever is sent
_LONGEST = 6000  # characters of a parameter's value
_ONE_AT_A_TIME = threading.Lock()  # runs of a series begin together, and only one can make the experiment


class MlflowLogger(Logger):
    """Sends a run to MLflow."""

    def __init__(self) -> None:
        self._client: Any = None
        self._id = ""
        self._logged = dict.fromkeys(_SERIES, 0)  # the last iteration that earlier sessions have sent
        self._iteration = 0
        self._waiting: list[Any] = []
        self._sent_s = time.monotonic()

    def start(self, run: RunStart) -> None:
        """Create the run, or find that of an earlier session."""
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when it is imported
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._run_dir = run.run_dir.resolve()
        place = os.environ.get("MLFLOW_TRACKING_URI") or (self._run_dir.parent / "mlruns").as_uri()
        self._client = MlflowClient(tracking_uri=place)
        kept = self._run_dir / "mlflow.json"
        if kept.is_file():
            try:
                self._id = check(read_object(kept), Fields({"run_id": one_line}), kept)["run_id"]
                for name in _SERIES:
                    history = self._client.get_metric_history(self._id, name)
                    self._logged[name] = max((metric.step for metric in history), default=0)
                self._client.update_run(self._id, status="RUNNING")
            except (FormatError, MlflowException):
                self._id = ""  # of another server, or damaged: a new one
        if not self._id:
            self._logged = dict.fromkeys(_SERIES, 0)
            self._id = self._created(run)
            write_json(kept, {"run_id": self._id})

    def _created(self, run: RunStart) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        with _ONE_AT_A_TIME:
            found = self._client.get_experiment_by_name(name)
            number = found.experiment_id if found else self._client.create_experiment(name)
        tags = {"task": run.task, "method": run.method, "backbone": run.backbone}
        made = self._client.create_run(number, run_name=run.run_dir.name, tags=tags)
        for key, value in flat(run.config).items():
            self._client.log_param(made.info.run_id, key, str(value)[:_LONGEST])
        return str(made.info.run_id)

    def iteration(self, progress: Progress) -> None:
        """Send the losses."""
        self._add(progress, of_progress(progress))

    def checkpoint(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Send the score."""
        self._add(progress, of_checkpoint(checkpoint))

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Send what is left, the final scores and the files."""
        if result is not None:
            self._wait(self._iteration, of_result(result))
        self._send()
        if result is not None:
            for name in ("result.json", "curve.png"):
                self._client.log_artifact(self._id, str(self._run_dir / name))
        self._client.set_terminated(self._id, "KILLED" if result is None else "FINISHED")

    def _add(self, progress: Progress, values: Mapping[str, float]) -> None:
        self._iteration = progress.iteration
        if any(name in values and self._logged[name] >= progress.iteration for name in _SERIES):
            return
        self._wait(progress.iteration, values)
        if time.monotonic() - self._sent_s > EVERY_S:
            self._send()

    def _wait(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in values.items()]

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for first in range(0, len(waiting), 1000):  # the most that a server takes at once
            self._client.log_batch(self._id, metrics=waiting[first : first + 1000])
        self._sent_s = time.monotonic()

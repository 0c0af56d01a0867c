"""What follows a run: the four calls, over several sessions; TensorBoard, MLflow, W&B without a network."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import mp2
from tuning_world import World

from mp2.optimizers.two_stage import Checkpoint, Progress
from mp2.runs import BbtConfig, LayerConfig, RouterConfig, resume_run, start_run, start_series
from mp2.runs.journal import Journal
from mp2.runs.loggers import LOGGERS, Logger, RunStart, create_loggers
from mp2.runs.loggers.logger import Several
from mp2.training.config import TuneConfig
from mp2.training.tune_run import start_tune

GENERATIONS = [9, 15, 21, 27, 30]  # the last iteration of each


@pytest.fixture(scope="module")
def config(world: World) -> BbtConfig:
    return BbtConfig(
        task=str(world.card),
        head="span",
        data=str(world.data),
        backbone=str(world.backbone),
        prompts=str(world.deep),
        iters=30,
        router=RouterConfig(iterations=9),
        layers=LayerConfig(popsize=6),
        shots=2,
        test_limit=4,
        runtime="torch",
        threads=1,
    )


class Told(Logger):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, run: RunStart) -> None:
        assert run.run_dir.is_dir()
        self.calls.append(("start", run.task, run.seed))

    def iteration(self, progress: Progress) -> None:
        assert progress.train_loss <= progress.generation_loss
        self.calls.append(("iteration", progress.iteration, progress.live))

    def checkpoint(self, checkpoint: Checkpoint, progress: Progress) -> None:
        assert checkpoint.dev_score == progress.dev_score
        self.calls.append(("checkpoint", checkpoint.at, checkpoint.iteration, progress.live))

    def end(self, result: Mapping[str, Any] | None) -> None:
        self.calls.append(("end", None if result is None else result["iterations"]))


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Let the n-th write of a journal be the last one, until called with 0."""
    append, n_writes = Journal.append, [0, 0]

    def stop(self: Journal, lines: list[dict[str, Any]]) -> None:
        n_writes[0] += 1
        if n_writes[0] == n_writes[1]:
            raise KeyboardInterrupt
        append(self, lines)

    def at(n: int) -> None:
        n_writes[:] = [0, n]

    monkeypatch.setattr(Journal, "append", stop)
    yield at
    at(0)


def stopped_and_resumed(
    config: BbtConfig, out: Path, killed_at: Callable[[int], None], logger: Callable[[], Logger]
) -> dict[str, Any]:
    killed_at(7)
    with pytest.raises(KeyboardInterrupt):
        start_run(config, out, logger())
    killed_at(0)
    (run_dir,) = [path.parent for path in out.glob("*/config.json")]
    return resume_run(run_dir, logger())


def test_the_four_calls_of_a_run(config: BbtConfig, tmp_path: Path) -> None:
    told = Told()
    start_run(config, tmp_path, told)
    assert told.calls[0] == ("start", "mood", 8)
    assert told.calls[1] == ("checkpoint", "untuned", 1, True)
    assert told.calls[-1] == ("end", 30)
    iterations = [call[1] for call in told.calls if call[0] == "iteration"]
    assert iterations == GENERATIONS
    assert ("checkpoint", "stage1", 9, True) in told.calls
    assert told.calls[-2][0] == "iteration"
    assert ("checkpoint", "stage2", 30, True) in told.calls


def test_a_resumed_run_tells_of_everything_again(
    config: BbtConfig, tmp_path: Path, killed_at: Callable[[int], None]
) -> None:
    sessions: list[Told] = []

    def logger() -> Logger:
        sessions.append(Told())
        return sessions[-1]

    stopped_and_resumed(config, tmp_path, killed_at, logger)
    first, second = (session.calls for session in sessions)
    assert first[-1] == ("end", None)
    assert second[-1] == ("end", 30)
    known = [call[:-1] for call in first[1:-1]]
    assert [call[:-1] for call in second[1 : 1 + len(known)]] == known
    live = [call[-1] for call in second[1:-1]]
    assert live.count(True) >= 3
    assert live == sorted(live)
    assert 0 < live.count(False) <= len(known)


def test_gradient_tuning_calls_every_epoch(config: BbtConfig, tmp_path: Path) -> None:
    class Epochs(Told):
        def iteration(self, progress: Progress) -> None:
            self.calls.append(("iteration", progress.iteration, progress.generation_loss > 0))

    told = Epochs()
    start_tune(TuneConfig(run=config, epochs=4, dev_every=2), tmp_path, told)
    assert [call for call in told.calls if call[0] == "iteration"] == [
        ("iteration", epoch, True) for epoch in (1, 2, 3, 4)
    ]
    assert [call[1] for call in told.calls if call[0] == "checkpoint"] == ["untuned", "stage1", "stage2"]
    assert (told.calls[0][0], told.calls[-1]) == ("start", ("end", 4))


def test_a_logger_that_fails_ends_and_the_run_does_not(
    config: BbtConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Logger):
        def iteration(self, progress: Progress) -> None:
            raise OSError(28, "No space left on device")

    told = Told()
    assert start_run(config, tmp_path, Several({"broken": Broken(), "told": told}))["iterations"] == 30
    assert told.calls[-1] == ("end", 30)
    assert [line for line in capsys.readouterr().err.splitlines() if "broken" in line] == [
        "mp2: the run goes on without broken: OSError: [Errno 28] No space left on device"
    ]


def test_an_unknown_logger_and_a_missing_package_are_refused_before_any_work(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("bbt", *world.options(), "--out", tmp_path / "none")
    done = mp2(*words, "--log", "tensorbord")
    assert done.exit_code == 2
    assert "unknown logger 'tensorbord'. Did you mean 'tensorboard'?" in done.stderr
    monkeypatch.setattr("mp2.runs.loggers.logger.importlib.util.find_spec", lambda name: None)
    for name, extra in LOGGERS.items():
        done = mp2(*words, "--log", name)
        assert done.exit_code == 2
        assert f"--log {name}: the package is not installed; pip install 'mp2[{extra}]'" in done.stderr
    assert not (tmp_path / "none").exists()


def test_tensorboard_shows_each_generation_of_a_resumed_run_once(
    config: BbtConfig, tmp_path: Path, killed_at: Callable[[int], None]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = stopped_and_resumed(config, tmp_path, killed_at, create_loggers(["tensorboard"]))
    events = EventAccumulator(str(Path(result["run_dir"]) / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/generation_loss")}
    assert list(losses) == GENERATIONS
    dev = {event.step: event.value for event in events.Scalars("dev/score")}
    assert dev[9] == pytest.approx(result["stages"]["stage1"]["dev_score"])
    assert events.Scalars("test/stage2")[0].value == pytest.approx(result["stages"]["stage2"]["test_score"])
    majority = result["baselines"]["majority"]["dev_score"]
    assert events.Scalars("baselines/dev/majority")[0].value == pytest.approx(majority)


def test_mlflow_keeps_a_resumed_run_as_one_in_files(
    config: BbtConfig, tmp_path: Path, killed_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = stopped_and_resumed(config, tmp_path, killed_at, create_loggers(["mlflow"]))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mp2").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == Path(result["run_dir"]).name
    assert run.data.params["router.iterations"] == "9"
    assert run.data.metrics["final/test"] == result["test_score"]
    losses = client.get_metric_history(run.info.run_id, "train/generation_loss")
    assert [metric.step for metric in losses] == GENERATIONS
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"result.json", "curve.png"}


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run's file: protocol buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768  # of the block
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_weights_and_biases_keeps_runs_offline(
    config: BbtConfig, tmp_path: Path, killed_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    result = stopped_and_resumed(config, tmp_path / "one", killed_at, create_loggers(["wandb"]))
    folders = sorted((Path(result["run_dir"]) / "wandb").glob("offline-run-*"))
    number = json.loads((Path(result["run_dir"]) / "wandb.json").read_text())["id"]
    assert {folder.name.rsplit("-", 1)[1] for folder in folders} == {number}
    message = pytest.importorskip("google.protobuf.message")
    records: list[Any] = []
    for _ in range(200):  # the library's own process writes the files, and is not waited for
        try:
            records = [r for folder in folders for r in wandb_records(folder / f"run-{number}.wandb")]
        except message.DecodeError:  # half written
            records = []
        if sum(record.WhichOneof("record_type") == "exit" for record in records) == 2:
            break
        time.sleep(0.1)
    logged = {
        record.history.step.num: {item.key or item.nested_key[0] for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    }
    assert sorted(logged) == [1, *GENERATIONS]
    assert {"train/generation_loss", "train/loss", "dev/score"} <= logged[9]


def test_runs_side_by_side_have_loggers_of_their_own(
    config: BbtConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    configs = [replace(config, seed=seed) for seed in (8, 13)]
    results = list(start_series(configs, tmp_path, create_loggers(["mlflow", "tensorboard"])))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    runs = client.search_runs([client.get_experiment_by_name("mp2").experiment_id])
    found = {run.data.params["seed"]: run.data.metrics["final/dev"] for run in runs}
    assert found == {str(result["seed"]): result["dev_score"] for result in results}


def test_no_logger_calls_home(tmp_path: Path) -> None:
    """Without CI or pytest in the environment, in which the libraries are silent by themselves."""
    program = """
import socket, sys
from pathlib import Path
def refuse(*arguments):
    raise SystemExit(f"a connection: {arguments}")
connect = socket.socket.connect
socket.socket.connect = lambda self, address: (
    connect(self, address) if self.family == socket.AF_UNIX or address[0] == "127.0.0.1" else refuse(address))
socket.getaddrinfo = refuse
from mp2.optimizers.two_stage import Progress
from mp2.runs.loggers import RunStart, create_loggers
logger = create_loggers(["mlflow", "wandb", "tensorboard"])()
out = Path(sys.argv[1]) / "run"
out.mkdir()
logger.start(RunStart(out, "t", "m", 8, "b", {"seed": 8}))
logger.iteration(Progress(1, 2, 9, 0.5, 0.5, True, 0.6))
logger.end(None)
from mlflow.telemetry import get_telemetry_client
assert get_telemetry_client() is None
import wandb.env
assert not wandb.env.error_reporting_enabled()
"""
    kept = {
        name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ
    }
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**kept, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "goes on without" not in done.stderr
    assert (tmp_path / "mlruns").is_dir()
    assert list(tmp_path.glob("run/wandb/offline-run-*"))

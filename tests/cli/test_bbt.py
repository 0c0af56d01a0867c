"""`mp2 bbt`, `mp2 predict` and `mp2 doctor` end to end on a tiny random backbone."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import mp2, mp2_json, predicted_accuracy, predictions
from safetensors.numpy import load_file
from tuning_world import World

from mp2.runs import run
from mp2.runs.config import BbtConfig
from mp2.runs.frozen_model import resolve_paths
from mp2.runs.journal import Journal

FIELDS = {
    "task",
    "method",
    "seed",
    "backbone",
    "iterations",
    "train_loss",
    "dev_score",
    "test_score",
    "metric",
    "seconds",
    "engine",
    "run_dir",
}
SHORT = ["--iters", "70", "--router-iters", "20", "--popsize", "8", "--shots", "4", "--seed", "13"]


def bbt(*arguments: object) -> Any:
    return mp2_json("bbt", *arguments)


def comparable(result: dict[str, Any]) -> dict[str, Any]:
    """The result without times and places."""
    return {k: v for k, v in result.items() if k not in ("seconds", "run_dir")}


@pytest.fixture(scope="module")
def unbroken(world: World) -> dict[str, Any]:
    return bbt(*world.options(), *SHORT)


def test_result_has_the_promised_fields_and_files(unbroken: dict[str, Any]) -> None:
    assert set(unbroken) >= FIELDS
    assert set(unbroken["seconds"]) >= {"stage1", "stage2", "forward", "suggest", "dev"}
    assert set(unbroken["engine"]) == {"runtime", "precision", "device"}
    assert unbroken["iterations"] == 70
    assert unbroken["method"] == "mp2-deep"
    run_dir = Path(unbroken["run_dir"])
    files = {p.name for p in run_dir.iterdir()} - {"lock"}
    wanted = {"config.json", "card.toml", "journal.jsonl", "prompt.safetensors", "result.json", "curve.png"}
    assert files == wanted
    assert json.loads((run_dir / "result.json").read_text()) == unbroken
    assert (run_dir / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert unbroken["stages"]["untuned"]["train_loss"] >= unbroken["best_train_loss"]


def test_config_json_can_be_read_back(unbroken: dict[str, Any]) -> None:
    path = Path(unbroken["run_dir"]) / "config.json"
    values = json.loads(path.read_text())
    config = BbtConfig.from_json(values["config"])
    assert config.to_json() == values["config"]
    assert config.sha256() == values["config_sha256"]
    assert (config.seed, config.runtime, config.threads) == (13, "torch", 1)


def test_same_seed_gives_the_same_result_bit_for_bit(world: World, unbroken: dict[str, Any]) -> None:
    again = bbt(*world.options(), *SHORT)
    assert comparable(again) == comparable(unbroken)
    prompts = [Path(r["run_dir"], "prompt.safetensors").read_bytes() for r in (again, unbroken)]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_killed_at_every_journal_write_and_resumed_is_bit_identical(
    world: World, unbroken: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In this process, with the real engine: the journal's n-th write is torn and the run dies there."""
    short = ["--iters", "38", "--router-iters", "9", "--popsize", "8", "--shots", "2", "--test-limit", "5"]
    options = [*world.options(kind=kind), *short]
    whole = bbt(*options)
    write, left = Journal._write, 0

    def dies(self: Journal, data: bytes) -> None:
        nonlocal left
        left -= 1
        write(self, data if left else data[: len(data) // 2])
        if not left:
            raise KeyboardInterrupt

    n_events = len(_events(Path(whole["run_dir"])))
    for n_writes in range(2, n_events + 2):
        left = n_writes
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "_write", dies)
            before = set((world.root / "runs").iterdir())
            stopped = mp2("bbt", *options)
        assert stopped.exit_code == 130
        (run_dir,) = set((world.root / "runs").iterdir()) - before
        assert f"mp2 bbt --resume {run_dir}" in stopped.stderr
        resumed = bbt("--resume", run_dir)
        assert comparable(resumed) == comparable(whole), f"killed at write {n_writes} of {n_events}"
        assert (run_dir / "prompt.safetensors").read_bytes() == Path(
            whole["run_dir"], "prompt.safetensors"
        ).read_bytes()


def _events(run_dir: Path) -> list[dict[str, Any]]:
    """First lines of the journal's events, without the header."""
    lines = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()[1:]]
    return [line for line in lines if line["event"] == "scores" or line["iteration"] == line["of"][0] + 1]


def _start(world: World, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "mp2", "bbt"),
        *world.options(),
        *arguments,
        "--out",
        str(out),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    ignored = signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background
    try:
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGINT, ignored)


def _wait_for_lines(out: Path, n: int, process: subprocess.Popen[str]) -> Path:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for journal in out.glob("*/journal.jsonl"):
            if journal.read_bytes().count(b"\n") >= n:
                return journal.parent
        time.sleep(0.002)
    raise AssertionError(f"no {n} journal lines: {process.communicate()}")


LONG = ["--iters", "400", "--router-iters", "40", "--popsize", "8", "--shots", "4", "--test-limit", "6"]


@pytest.mark.slow
def test_sigkill_in_a_process_of_its_own_and_resumed_is_bit_identical(world: World, tmp_path: Path) -> None:
    whole = bbt(*world.options(), *LONG)
    for n_lines in (1, 60, 250):
        out = tmp_path / str(n_lines)
        process = _start(world, out, *LONG)
        run_dir = _wait_for_lines(out, n_lines, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (run_dir / "result.json").exists()
        resumed = bbt("--resume", run_dir)
        assert comparable(resumed) == comparable(whole)
        prompts = [Path(r["run_dir"], "prompt.safetensors").read_bytes() for r in (resumed, whole)]
        assert prompts[0] == prompts[1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_print_the_resume_command(
    world: World, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    process = _start(world, tmp_path, *LONG)
    run_dir = _wait_for_lines(tmp_path, 100, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"go on with: mp2 bbt --resume {run_dir}" in stderr
    assert "Traceback" not in stderr
    assert bbt("--resume", run_dir)["iterations"] == 400


@pytest.mark.parametrize("what", ["_write", "save_tuned"])
def test_a_full_disk_exits_1_and_loses_nothing(
    world: World, unbroken: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    def full(self: object, data: object, *rest: object) -> None:
        if what == "save_tuned" or b'"stage": 2' in data:  # type: ignore[operator]
            raise OSError(28, "No space left on device")
        write(self, data)  # type: ignore[arg-type]

    write = Journal._write
    with monkeypatch.context() as patch:
        patch.setattr(Journal if what == "_write" else run, what, full)
        done = mp2("bbt", *world.options(), *SHORT, "--out", tmp_path)
    assert done.exit_code == 1
    (run_dir,) = tmp_path.iterdir()
    assert "No space left on device" in done.stderr
    assert f"mp2 bbt --resume {run_dir}" in done.stderr
    assert comparable(bbt("--resume", run_dir)) == comparable(unbroken)


@pytest.fixture
def locked(unbroken: dict[str, Any]) -> Iterator[Path]:
    """The finished run's folder, held by another process."""
    folder = Path(unbroken["run_dir"])
    code = (
        "import filelock as f, sys; x = f.FileLock(sys.argv[1]); x.acquire(); print(1, flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    yield folder
    holder.kill()
    holder.communicate()


def test_a_second_process_in_one_folder_is_refused(locked: Path) -> None:
    done = mp2("bbt", "--resume", locked)
    assert done.exit_code == 2
    assert "another process works in" in done.stderr


def test_a_run_folder_that_cannot_be_written_in_is_one_line(
    unbroken: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mp2.folder_lock.open_own", refused)
    run_dir = Path(shutil.copytree(unbroken["run_dir"], tmp_path / "run"))
    assert bbt("--resume", run_dir) == unbroken  # it has ended: nothing is to be written
    (run_dir / "result.json").unlink()
    done = mp2("bbt", "--resume", run_dir)
    assert done.exit_code == 2
    assert f"cannot write in {run_dir}: Permission denied" in done.stderr


def test_resuming_a_finished_run_reads_its_result_back(unbroken: dict[str, Any]) -> None:
    assert bbt("--resume", unbroken["run_dir"]) == unbroken


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("result.json", b"", "result.json: not JSON"),
        ("result.json", b"\xff", "result.json: not UTF-8"),
        ("result.json", b"[1]", "result.json: is a JSON list, expected an object"),
        ("result.json", b"{}", "result.json: field 'task': missing"),
        ("result.json", b'"iterations": "70"', "field 'iterations': is '70', expected a whole number"),
        ("result.json", b'"seconds": {}', "result.json: field 'seconds.stage1': missing"),
        ("prompt.safetensors", b"", "prompt.safetensors: not a safetensors file"),
        ("prompt.safetensors", b"junk" * 9, "prompt.safetensors: not a safetensors file"),
        ("prompt.safetensors", None, "prompt.safetensors: no such file"),
    ],
)
def test_what_a_finished_run_lost_is_made_again_from_its_journal(
    unbroken: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    content: bytes | None,
    message: str,
) -> None:
    """As ``mp2 predict`` says, where it is the prompt that is missing; and nothing is computed again."""
    run_dir = Path(shutil.copytree(unbroken["run_dir"], tmp_path / "run"))
    whole = (run_dir / "prompt.safetensors").read_bytes()
    if content is None:
        (run_dir / file).unlink()
    elif content.startswith(b'"'):
        damaged = {**unbroken, **json.loads(b"{%s}" % content)}
        (run_dir / file).write_text(json.dumps(damaged), "utf-8")
    else:
        (run_dir / file).write_bytes(content)
    if file == "prompt.safetensors":
        done = mp2("predict", "--run", run_dir, "--input", "-", input="好")
        assert done.exit_code == 2
        assert message in done.stderr
        assert f"make it from the run's journal: mp2 bbt --resume {run_dir}\n" in done.stderr
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", None)
        done = mp2("bbt", "--resume", run_dir, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    assert message in done.stderr
    assert done.stderr.count("replaying the run's journal to write it again") == 1
    assert comparable(json.loads(done.stdout)) == comparable(unbroken)
    assert (run_dir / "prompt.safetensors").read_bytes() == whole
    assert bbt("--resume", run_dir) == json.loads(done.stdout)
    assert len(predictions(run_dir, "-", input="好")) == 1


def test_a_run_of_tune_is_not_resumed_by_bbt(unbroken: dict[str, Any], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(unbroken["run_dir"], tmp_path / "run"))
    (run_dir / "tune.json").write_text("{}")
    assert bbt("--resume", run_dir) == unbroken
    (run_dir / "prompt.safetensors").unlink()
    done = mp2("bbt", "--resume", run_dir)
    assert (done.exit_code, "keeps nothing to make it from: tune again" in done.stderr) == (2, True)
    done = mp2("predict", "--run", run_dir, "--input", "-", input="好")
    assert (done.exit_code, "keeps nothing to make it from: tune again" in done.stderr) == (2, True)


def test_resume_names_what_is_damaged_in_the_journal(unbroken: dict[str, Any], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(unbroken["run_dir"], tmp_path / "run"))
    (run_dir / "result.json").unlink()
    journal = run_dir / "journal.jsonl"
    lines = journal.read_text().splitlines()
    lines[5] = json.dumps(json.loads(lines[5]) | {"loss": "low"})
    journal.write_text("\n".join(lines) + "\n")
    done = mp2("bbt", "--resume", run_dir)
    assert done.exit_code == 2
    assert "journal.jsonl:6: field 'loss': is 'low', expected a number" in done.stderr
    journal.unlink()
    journal.mkdir()
    done = mp2("bbt", "--resume", run_dir)
    assert (done.exit_code, "journal.jsonl: is a folder" in done.stderr) == (2, True)


def test_resume_refuses_other_options_and_folders_that_are_no_runs(
    unbroken: dict[str, Any], tmp_path: Path
) -> None:
    done = mp2("bbt", "--resume", unbroken["run_dir"], "--iters", "9")
    assert (done.exit_code, "drop --iters" in done.stderr) == (2, True)
    done = mp2("bbt", "--resume", tmp_path)
    assert (done.exit_code, "no config.json" in done.stderr) == (2, True)


def test_resume_refuses_changed_data(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data" / "mood"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_bytes((world.data / "mood" / f"{split}.jsonl").read_bytes())
    options = [*world.options(), *SHORT, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs")]

    def dies(self: Journal, data: bytes) -> None:
        write(self, data)
        if b'"stage": 2' in data:
            raise KeyboardInterrupt

    write = Journal._write
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_write", dies)
        assert mp2("bbt", *options).exit_code == 130
    lines = (data / "train.jsonl").read_text("utf-8").splitlines()
    (data / "train.jsonl").write_text("\n".join(lines[::-1][:60]), "utf-8")
    (run_dir,) = (tmp_path / "runs").iterdir()
    done = mp2("bbt", "--resume", run_dir)
    assert done.exit_code == 2
    assert "data_sha256" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "tnewz"], "Did you mean 'tnews'"),
        (["--backbone", "./nowhere"], "nowhere"),
        (["--runtime", "torhc"], "Did you mean 'torch'"),
        (["--router-search", "exhaustiv"], "Did you mean 'exhaustive'"),
        (["--router-search", "nevergrad:NGOptt"], "Did you mean 'NGOpt"),
        (["--router-search", "exhaustive", "--iters", "50"], "exhaustive search needs 2^12 iterations"),
        (["--runtime", "tensorrt"], "unknown runtime 'tensorrt'. Did you mean 'onnxruntime-tensorrt'"),
        (["--cma", "diagonl"], "Did you mean 'diagonal'"),
        (["--prompts", "mini-depe"], "Did you mean 'mini-deep'"),
        (["--shallow"], "prompts of"),
        (["--iters", "0"], "iters is 0, expected at least 1"),
        (["--seeds", "8,x"], "expected whole numbers with commas"),
        (["--max-tokens", "500"], "max_tokens is 500, expected at most 96"),
        (["--max-tokens", "12"], "does not fit 12 tokens"),
        (
            ["--iters", "60", "--popsize", "50", "--router-iters", "11"],
            "stage II has 49 of the 60 iterations",
        ),
        (["--iters", "60", "--popsize", "50", "--router-iters", "11", "--explain"], "popsize is 50, but"),
        (["--iters", "60", "--popsize", "3"], "popsize is 3, but stage II has 0 of the 60 iterations"),
        (["--sigma-shallow", "0.1"], "--sigma-shallow is for shallow prompts, and these are deep: drop it"),
        (["--deep", "--sigma-shallow", "0.5"], "--sigma-shallow is for shallow prompts"),
        (["--sigma-shallow", "0.5", "--explain"], "--sigma-shallow is for shallow prompts"),
        (["--shallow", "--deep"], "--deep and --shallow were both given: drop one of them"),
    ],
)
def test_what_cannot_be_done_exits_2_and_makes_no_folder(
    world: World, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = mp2("bbt", *world.options(), *arguments, "--out", tmp_path / "runs")
    assert done.exit_code == 2, (done.output, done.exception)
    assert message in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", ["--sigma-deep", "--sigma-input"])
def test_step_sizes_of_deep_prompts_are_refused_for_shallow_ones(
    world: World, tmp_path: Path, option: str
) -> None:
    """What kind they are is known when the file is read."""
    done = mp2("bbt", *world.options(kind="shallow"), option, "0.2", "--out", tmp_path / "runs")
    assert done.exit_code == 2
    assert f"{option} is for deep prompts, and these are shallow: drop it" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_malformed_data_names_file_line_and_field(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "mood"
    folder.mkdir()
    text = (world.data / "mood" / "train.jsonl").read_text("utf-8").replace('"pos"', '"good"', 1)
    (folder / "train.jsonl").write_text(text, "utf-8")
    done = mp2("bbt", *world.options(), "--data", tmp_path)
    assert done.exit_code == 2
    assert "train.jsonl:" in done.stderr
    assert "unknown label 'good'" in done.stderr


def test_several_seeds_give_a_run_each_and_a_mean(world: World) -> None:
    short = ["--iters", "12", "--router-iters", "6", "--popsize", "4", "--shots", "2", "--seeds", "8,13"]
    done = mp2("bbt", *world.options(), *short)
    assert done.exit_code == 0, done.stderr
    results = bbt(*world.options(), *short)
    scores = [100 * r["test_score"] for r in results]
    mean, deviation = statistics.mean(scores), statistics.stdev(scores)
    (last,) = (line for line in done.stdout.splitlines() if line.startswith("mood  mean of 2"))
    assert last.endswith(f"{mean:.1f} ± {deviation:.1f}")
    assert [r["seed"] for r in results] == [8, 13]
    assert len({r["run_dir"] for r in results}) == 2


@pytest.mark.parametrize("method", ["exhaustive", "random", "none", "nevergrad:DiscreteOnePlusOne"])
def test_every_router_search_runs_on_shallow_prompts(world: World, method: str) -> None:
    short = ["--iters", "24", "--popsize", "4", "--shots", "2", "--no-test", "--router-search", method]
    limit = [] if method in ("exhaustive", "none") else ["--router-iters", "10"]
    result = bbt(*world.options(kind="shallow"), *short, *limit)
    assert result["test_score"] is None
    assert result["method"] == "mp2-shallow"
    assert result["iterations"] == 24
    stage_one = {"exhaustive": 16, "none": 1}.get(method, 10)
    assert result["stages"]["stage1"]["iteration"] == stage_one


def test_the_resume_command_can_be_typed_as_it_stands(tmp_path: Path) -> None:
    from mp2.runs.run_folder import resume_command

    words = shlex.split(resume_command(tmp_path / "my runs", Path("plain")))
    assert words == ["mp2", "bbt", "--resume", str(tmp_path / "my runs"), "--resume", "plain"]


def test_a_data_folder_of_the_environment_that_is_none_is_called_that(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MP2_DATA", "/nowhere")
    done = mp2("bbt", "--task", world.card, "--iters", 4)
    assert (done.exit_code, done.stderr) == (2, "mp2: MP2_DATA: there is no folder /nowhere\n")


def test_folders_named_like_what_the_package_has_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mini", "mini-deep", "mine"):
        Path(name).mkdir()
    config = resolve_paths(BbtConfig(task="demo_sentiment", prompts="mini-deep"))
    assert (config.backbone, config.prompts) == ("mini", "mini-deep")
    config = resolve_paths(BbtConfig(task="demo_sentiment", backbone="mine", prompts="mine"))
    assert (config.backbone, config.prompts) == (str(tmp_path / "mine"), str(tmp_path / "mine"))


def test_runs_that_have_no_iterations_for_stage_two_say_so(world: World) -> None:
    short = ["--iters", "6", "--shots", "2", "--no-test"]
    said = "stage I takes all 6 iterations; --router-iters leaves some to stage II"
    assert said in mp2("bbt", *world.options(), *short).stderr
    assert said not in mp2("bbt", *world.options(), *short, "--router-only").stderr
    part = mp2("bbt", *world.options(), *short, "--router-iters", "4").stderr
    assert said not in part
    assert "stage II has 2 iterations, less than one generation of 20" in part
    whole = mp2("bbt", *world.options(), *short, "--router-iters", "2", "--popsize", "4").stderr
    assert "less than one generation" not in whole


def test_router_only(world: World) -> None:
    result = bbt(*world.options(), "--router-only", "--router-iters", "9", "--shots", "2")
    assert (result["iterations"], result["method"]) == (9, "mp2-deep-router")
    assert set(result["stages"]) == {"untuned", "stage1"}


def test_the_table_shows_three_stages(world: World) -> None:
    done = mp2(
        "bbt", *world.options(), "--iters", "12", "--router-iters", "6", "--popsize", "4", "--shots", "2"
    )
    assert done.exit_code == 0, done.stderr
    for part in ("untuned", "stage I (router)", "stage II", "dev accuracy", "test accuracy", "12 iterations"):
        assert part in done.stdout
    assert "stage II  12/12  ETA 0:00  train loss" in done.stderr


def test_a_tuned_prompt_is_one_vector_a_layer(unbroken: dict[str, Any], world: World) -> None:
    tensors = load_file(Path(unbroken["run_dir"]) / "prompt.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {"z": ((3, 5), np.dtype(np.float32))}


def test_predictions_on_the_test_set_reproduce_the_test_score(unbroken: dict[str, Any], world: World) -> None:
    path = world.data / "mood" / "test.jsonl"
    assert predicted_accuracy(unbroken["run_dir"], path) == unbroken["test_score"]
    assert all(0.5 <= found["probability"] <= 1 for found in predictions(unbroken["run_dir"], path))


def test_predict_reads_plain_text_from_standard_input(unbroken: dict[str, Any]) -> None:
    text = "真的很好\n\n太差了\n"
    first, blank, last = predictions(unbroken["run_dir"], "-", input=text)
    assert blank == {"label": None, "probability": None, "reason": "empty line"}
    as_json = "\n".join(json.dumps({"text": t}) for t in text.split())
    assert [first, last] == predictions(unbroken["run_dir"], "-", input=as_json)


@pytest.mark.parametrize("task", ["find", "pick"])
def test_extraction_and_multiple_choice_tune_and_predict(world: World, task: str) -> None:
    card = world.question_card if task == "find" else world.choice_card
    short = ["--iters", "20", "--router-iters", "8", "--popsize", "4"]
    result = bbt(*world.options(card=card), *short)
    path = world.data / task / "test.jsonl"
    found = predictions(result["run_dir"], path)
    examples = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len(found) == len(examples)
    equal = [
        any(p["answer"].lower().strip() == a["text"].lower().strip() for a in e["answers"])
        for p, e in zip(found, examples, strict=True)
        if task == "find"
    ]  # no punctuation in these texts
    assert result["test_exact_match"] == (sum(equal) / len(equal) if task == "find" else None)
    assert result["stages"]["stage2"]["test_exact_match"] == result["test_exact_match"]
    for prediction, example in zip(found, examples, strict=True):
        assert 0 <= prediction["probability"] <= 1
        if task == "find":
            assert prediction["answer"] in example["context"]
        else:
            assert prediction["option"] == example["options"][prediction["label"]]


def test_a_run_of_a_gpu_labels_where_there_is_none_and_says_so(
    unbroken: dict[str, Any], tmp_path: Path
) -> None:
    text = "好\n坏\n"
    expected = predictions(unbroken["run_dir"], "-", input=text)
    run = Path(shutil.copytree(unbroken["run_dir"], tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    config["config"] |= {"device": "cuda:7", "precision": "bf16", "runtime": "torch"}
    (run / "config.json").write_text(json.dumps(config))
    done = mp2("predict", "--run", run, "--input", "-", input=text)
    assert done.exit_code == 0
    assert "the run computed with torch, bf16, cuda:7" in done.stderr
    assert "labelling with torch, fp32, cpu instead" in done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)
    done = mp2("predict", "--run", run, "--input", "-", "--device", "cpu", input=text)
    assert (done.exit_code, "labelling with" in done.stderr) == (0, False)
    assert "loading backbone" in done.stderr
    assert done.stdout == "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found)
    done = mp2("predict", "--run", run, "--input", "-", "--device", "cuda:7", input=text)
    assert (done.exit_code, "device 'cuda:7' is not there" in done.stderr) == (2, True)


def test_predict_takes_the_weights_from_where_they_are_now(
    unbroken: dict[str, Any], world: World, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(unbroken["run_dir"], tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    here = {name: config["config"][name] for name in ("backbone", "prompts")}
    config["config"] |= {name: str(tmp_path / "gone" / name) for name in here}
    (run / "config.json").write_text(json.dumps(config))
    done = mp2("predict", "--run", run, "--input", "-", input="好")
    assert (done.exit_code, str(tmp_path / "gone") in done.stderr) == (2, True)
    places = [f"--{name}={place}" for name, place in here.items()]
    done = mp2("predict", "--run", run, "--input", "-", *places, input="好")
    assert (done.exit_code, json.loads(done.stdout)["label"] in ("pos", "neg")) == (0, True)


def test_predict_says_what_is_wrong(unbroken: dict[str, Any], world: World, tmp_path: Path) -> None:
    run = unbroken["run_dir"]
    done = mp2("predict", "--run", run, "--input", tmp_path / "no.jsonl")
    assert (done.exit_code, "there is no file" in done.stderr) == (2, True)
    done = mp2("predict", "--run", run, "--input", "-", input='{"txt": "好"}')
    assert (done.exit_code, "<stdin>:1: field 'text'" in done.stderr) == (2, True)
    for text in ("", "\n \n"):
        done = mp2("predict", "--run", run, "--input", "-", input=text)
        assert (done.exit_code, "<stdin>: nothing to label" in done.stderr) == (2, True)
    (tmp_path / "latin.txt").write_bytes("好\ncafé\n".encode().replace(b"\xc3\xa9", b"\xe9"))
    done = mp2("predict", "--run", run, "--input", tmp_path / "latin.txt")
    assert (done.exit_code, "latin.txt:2: not UTF-8" in done.stderr) == (2, True)
    done = mp2("predict", "--run", tmp_path / "nowhere", "--input", "-", input="好")
    assert (done.exit_code, "there is no folder" in done.stderr) == (2, True)
    done = mp2("predict", "--run", Path(run).parent, "--input", "-", input="好")
    assert (done.exit_code, f"runs in it: {Path(run).parent}" in done.stderr) == (2, True)
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "config.json").write_bytes((Path(run) / "config.json").read_bytes())
    done = mp2("predict", "--run", unfinished, "--input", "-", input="好")
    assert done.exit_code == 2
    assert "no such file: the run has not ended" in done.stderr
    assert f"mp2 bbt --resume {unfinished}" in done.stderr


def test_doctor_names_what_there_is_and_what_is_missing() -> None:
    done = mp2("doctor", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["runtimes"]["torch"]["available"]
    tensorrt = found["runtimes"]["tensorrt"]
    assert "has not been run by the authors" in tensorrt["note"]
    assert tensorrt["available"] or "pip install 'mp2[gpu]'" in tensorrt["install"]
    text = mp2("doctor").stdout
    for part in ("python", "onnxruntime", "tensorrt", "cores", "memory", "data"):
        assert part in text


def test_baselines_stand_beside_the_result_and_a_bad_one_is_said_in_words(unbroken: dict[str, Any]) -> None:
    lines = unbroken["baselines"]
    assert list(lines) == ["majority", "tfidf", "probe"]
    for line in lines.values():
        assert 0.0 <= line["dev_score"] <= 1.0
        assert 0.0 <= line["test_score"] <= 1.0
    best = max(line["test_score"] for line in lines.values())
    if unbroken["test_score"] <= best:
        assert unbroken["verdict"].startswith("test accuracy")
        assert "is not better than" in unbroken["verdict"]
    else:
        assert unbroken["verdict"] is None


def test_32_examples_tune_without_a_dev_set_and_without_baselines(world: World, tmp_path: Path) -> None:
    source = next(Path(world.data).glob("*/train.jsonl"))
    found: dict[str, list[str]] = {}
    for line in source.read_text("utf-8").splitlines():
        found.setdefault(json.loads(line)["label"], []).append(line)
    folder = tmp_path / "data" / source.parent.name
    folder.mkdir(parents=True)
    few = [line for lines in found.values() for line in lines[:4]]
    (folder / "train.jsonl").write_text("\n".join(few) + "\n", "utf-8")
    options = [*world.options(), "--data", tmp_path / "data", "--no-test", "--no-baselines"]
    done = mp2("bbt", *options, *SHORT, "--json")
    assert done.exit_code == 0, done.output
    assert "no dev set: train takes" in done.stderr
    result = json.loads(done.stdout)
    assert (result["dev_score"], result["baselines"], result["verdict"]) == (None, None, None)
    assert result["examples"]["dev"] == 0
    assert result["train_loss"] == result["best_train_loss"]
    done = mp2("bbt", *options, *SHORT)
    assert done.exit_code == 0, done.output


def test_predict_gives_a_line_for_each_line_in_order_with_what_is_kept(unbroken: dict[str, Any]) -> None:
    lines = ['{"text": "好", "id": 7}', "", '{"text": " ", "id": 8}', '{"text": "好", "id": 9}']
    run = unbroken["run_dir"]
    done = mp2("predict", "--run", run, "--input", "-", "--keep", "id", input="\n".join(lines) + "\n")
    assert done.exit_code == 0, done.output
    first, blank, empty, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert (first["id"], last["id"]) == (7, 9)
    assert first["label"] == last["label"]
    assert blank == {"label": None, "probability": None, "reason": "empty line"}
    assert empty == {"id": 8, "label": None, "probability": None, "reason": "text is empty"}


def test_predict_writes_csv_for_csv(unbroken: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new.csv"
    path.write_text('number,text\n1,"好, 好"\n2,\n3,不\n', "utf-8")
    done = mp2("predict", "--run", unbroken["run_dir"], "--input", path)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [(row["number"], row["text"]) for row in rows] == [("1", "好, 好"), ("2", ""), ("3", "不")]
    assert [bool(row["label"]) for row in rows] == [True, False, True]
    assert rows[1]["reason"] == "text is empty"


def test_scores_that_are_no_numbers_never_leave(
    unbroken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mp2.engine import Pending, Scorer

    outputs = Scorer.outputs

    def broken(self: Scorer, z: Any, inputs: Any) -> Any:
        return Pending.of([np.full_like(output, np.nan) for output in outputs(self, z, inputs).fetch()])

    monkeypatch.setattr(Scorer, "outputs", broken)
    done = mp2("predict", "--run", unbroken["run_dir"], "--input", "-", input="好")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "line 1: its scores are no numbers" in done.stderr

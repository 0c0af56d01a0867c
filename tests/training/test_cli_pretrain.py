"""``mp2 pretrain-backbone`` and ``mp2 pretrain`` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import mp2

from mp2.backbone import load_backbone, save_backbone
from mp2.prompts import load_prompts
from mp2.training import MlmConfig, PretrainInputs
from training.toy_runs import cut_at
from training.toy_tasks import lively_backbone, write_tasks


@pytest.fixture
def backbone_options(tmp_path: Path) -> list[object]:
    (tmp_path / "corpus").mkdir()
    rng = np.random.default_rng(0)
    text = "\n".join(rng.choice(["天气今日晴有雨！", "这个东西真的很好，不错。"], 120))
    (tmp_path / "corpus" / "a.txt").write_text(text, "utf-8")
    sizes = ["--layers", 2, "--hidden", 16, "--heads", 2, "--vocab-size", 200, "--max-positions", 32]
    run = ["--length", 16, "--batch-size", 8, "--precision", "fp32", "--threads", 1]
    return ["pretrain-backbone", "--corpus", tmp_path / "corpus", *sizes, *run]


def test_pretrain_backbone_writes_a_backbone_and_goes_on_where_it_was(
    backbone_options: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "small"
    done = mp2(*backbone_options, "--out", out, "--steps", 3)
    assert done.exit_code == 0, done.stderr
    backbone = load_backbone(out)
    assert done.stdout.strip() == f"{out}: small, {backbone.sha256[:12]}"
    assert "step 3/3 loss" in done.stderr
    assert (backbone.config.n_layers, backbone.config.hidden, backbone.config.ffn) == (2, 16, 64)
    again = mp2(*backbone_options, "--out", out, "--steps", 3)
    assert "resumed at step 3" in again.stderr
    assert again.stdout == done.stdout
    other = mp2(*backbone_options, "--out", out, "--steps", 4)
    assert other.exit_code == 2
    assert "made with other settings, data or backbone: steps" in other.stderr


def test_the_defaults_of_the_command_are_those_of_the_python_api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[MlmConfig] = []

    def remember(corpus: Path, out: Path, config: MlmConfig, **_: object) -> None:
        asked.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("mp2.training.mlm_trainer.train_mlm", remember)
    mp2("pretrain-backbone", "--corpus", tmp_path, "--out", tmp_path / "out")
    assert asked == [MlmConfig()]


def test_pretrain_backbone_says_what_is_wrong_with_its_input(
    backbone_options: list[object], tmp_path: Path
) -> None:
    empty = mp2("pretrain-backbone", "--corpus", tmp_path, "--out", tmp_path / "o")
    assert empty.exit_code == 2
    assert f"no *.txt or *.txt.xz files in {tmp_path}" in empty.stderr
    empty = mp2("pretrain-backbone", "--corpus", tmp_path / "nowhere", "--out", tmp_path / "o")
    assert empty.exit_code == 2
    assert f"there is no folder {tmp_path / 'nowhere'}, expected" in empty.stderr
    long = mp2(*backbone_options, "--out", tmp_path / "o", "--length", 64)
    assert long.exit_code == 2
    assert "length is 64, expected at most 32 (max_positions)" in long.stderr
    heads = mp2(*backbone_options, "--out", tmp_path / "o", "--heads", 3)
    assert heads.exit_code == 2
    assert "hidden is 16, expected a multiple of the 3 heads" in heads.stderr


@pytest.fixture
def options(tmp_path: Path) -> list[object]:
    _, data = write_tasks(tmp_path)
    save_backbone(lively_backbone(), tmp_path / "lively")
    sizes = ["--modules", 4, "--prompt-tokens", 3, "--intrinsic-dim", 8, "--max-tokens", 64, "--threads", 1]
    run = ["--backbone", tmp_path / "lively", "--data", data, "--batch-size", 8, "--dev-limit", 6]
    return ["pretrain", *run, *sizes]


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_pretrain_writes_prompts_and_prints_a_table(options: list[object], tmp_path: Path, kind: str) -> None:
    cards = [x for task in ("mood", "find") for x in ("--tasks", tmp_path / f"{task}.toml")]
    done = mp2(*options, *cards, "--out", tmp_path / "out", "--steps", 4, f"--{kind}")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["task", "before", "after"]
    assert {line.split()[0] for line in lines[1:]} == {"mood", "find", "mean"}
    assert "2 tasks, 120 training sequences" in done.stderr
    prompts = load_prompts(tmp_path / "out" / "prompts.safetensors", load_backbone(tmp_path / "lively"))
    assert (prompts.meta.kind, prompts.meta.tasks) == (kind, ("mood", "find"))
    provenance = prompts.meta.provenance
    assert provenance["config"]["steps"] == 4
    started = mp2(
        *options,
        *cards,
        "--out",
        tmp_path / "next",
        "--steps",
        2,
        f"--{kind}",
        "--init",
        tmp_path / "out" / "prompts.safetensors",
    )
    assert started.exit_code == 0, started.stderr


def test_pretrain_with_a_backbone_rate_writes_the_new_backbone(options: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = mp2(*options, "--tasks", tmp_path / "mood.toml", "--out", out, "--steps", 3, "--backbone-lr", 1e-3)
    assert done.exit_code == 0, done.stderr
    new = load_backbone(out / "backbone")
    assert new.sha256 != load_backbone(tmp_path / "lively").sha256
    load_prompts(out / "prompts.safetensors", new)


def test_tasks_may_be_given_as_the_shell_expands_a_glob(options: list[object], tmp_path: Path) -> None:
    cards = [tmp_path / f"{task}.toml" for task in ("find", "mood", "pick")]
    done = mp2("pretrain", "--tasks", *cards, *options[1:], "--out", tmp_path / "out", "--steps", 2)
    assert done.exit_code == 0, done.stderr
    assert load_prompts(tmp_path / "out" / "prompts.safetensors").meta.tasks == ("find", "mood", "pick")
    with_commas = mp2(
        *options, "--tasks", ",".join(map(str, cards)), "--out", tmp_path / "commas", "--steps", 2
    )
    assert with_commas.exit_code == 0, with_commas.stderr
    assert load_prompts(tmp_path / "commas" / "prompts.safetensors").meta.tasks == ("find", "mood", "pick")
    twice = mp2(*options, "--tasks", cards[0], cards[0], "--out", tmp_path / "twice", "--steps", 2)
    assert twice.exit_code == 2
    assert "find.toml' was given twice" in twice.stderr
    none = mp2(*options, "--tasks", "nowhere/*.toml", "--out", tmp_path / "none", "--steps", 2)
    assert none.exit_code == 2
    assert "no task card nowhere/*.toml" in none.stderr


def test_resume_takes_everything_from_the_folder(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mp2.training import Pretrainer

    command = [*options, "--tasks", tmp_path / "mood.toml", "--steps", 6, "--checkpoint-minutes", 0]
    unbroken = mp2(*command, "--out", tmp_path / "unbroken", "--temperature-end", 0.5)
    with cut_at(Pretrainer, 3):
        assert mp2(*command, "--out", tmp_path / "cut", "--temperature-end", 0.5).exit_code == 130
    monkeypatch.chdir(tmp_path / "data")  # from any folder
    resumed = mp2("pretrain", "--resume", tmp_path / "cut", "--threads", 1)
    assert resumed.exit_code == 0, resumed.stderr
    assert "resumed at step 3" in resumed.stderr
    assert resumed.stdout == unbroken.stdout
    hashes = [load_prompts(tmp_path / out / "prompts.safetensors").sha256 for out in ("cut", "unbroken")]
    assert hashes[0] == hashes[1]
    more = mp2("pretrain", "--resume", tmp_path / "cut", "--batch-size", 9)
    assert more.exit_code == 2
    assert "drop 'batch-size'" in more.stderr


def test_resume_finds_the_data_that_a_variable_named(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mp2.training import Pretrainer

    at = options.index("--data")
    command = [*options[:at], *options[at + 2 :], "--tasks", tmp_path / "mood.toml", "--steps", 4]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MP2_DATA", "data")
    with cut_at(Pretrainer, 2):
        assert mp2(*command, "--out", "cut", "--checkpoint-minutes", 0).exit_code == 130
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["inputs"]["data"] == str(tmp_path / "data")
    monkeypatch.delenv("MP2_DATA")
    monkeypatch.chdir(tmp_path / "data")
    resumed = mp2("pretrain", "--resume", tmp_path / "cut", "--threads", 1)
    assert resumed.exit_code == 0, resumed.stderr
    assert "resumed at step 2" in resumed.stderr


def test_names_of_embedded_models_stay_names_where_folders_are_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mini", "mini-deep", "own"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MP2_DATA", raising=False)
    known = PretrainInputs(tasks=("mood",), backbone="mini", init="mini-deep")
    assert known.absolute() == known
    own = PretrainInputs(tasks=("mood",), backbone="own", init="own").absolute()
    assert (own.backbone, own.init) == (str(tmp_path / "own"), str(tmp_path / "own"))


def test_resume_of_no_run_and_a_run_without_a_folder_are_refused(
    options: list[object], tmp_path: Path
) -> None:
    nothing = mp2("pretrain", "--resume", tmp_path / "nothing")
    assert nothing.exit_code == 2
    assert f"there is no {tmp_path / 'nothing' / 'config.json'}" in nothing.stderr
    (tmp_path / "config.json").write_text('{"steps": 3}')
    other = mp2("pretrain", "--resume", tmp_path)
    assert other.exit_code == 2
    assert "not the settings of a run of 'mp2 pretrain'" in other.stderr
    nowhere = mp2(*options, "--tasks", tmp_path / "mood.toml")
    assert nowhere.exit_code == 2
    assert "give --out DIR" in nowhere.stderr


def test_pretrain_without_names_takes_every_known_task_with_data(
    options: list[object], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    (data / "waimai").mkdir()
    for split in ("train", "dev"):
        texts = [("真的很好", "正面"), ("太差了", "负面")] * 6
        lines = [json.dumps({"text": t, "label": label}, ensure_ascii=False) for t, label in texts]
        (data / "waimai" / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    done = mp2(*options, "--out", tmp_path / "out", "--steps", 2)
    names = {line.split()[0] for line in done.stdout.splitlines()[1:-1]}
    assert done.exit_code == 0, done.stderr
    assert "waimai" in names
    assert not names & {"mood", "find", "pick"}  # no card of the package


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--tasks", "waimi"], "unknown task 'waimi'. Did you mean 'waimai'"),
        (["--backbone", "mimi"], "unknown backbone 'mimi'"),
        (["--temperature", "0"], "temperature is 0.0"),
        (["--precision", "fp8"], "unknown precision 'fp8'"),
        (["--init", "nowhere.safetensors"], "no prompt file 'nowhere.safetensors'"),
        (
            ["--schedule", "cosine"],
            "unknown schedule 'cosine'. Did you mean 'linear'? Known: constant, linear.",
        ),
    ],
)
def test_pretrain_says_what_was_typed_wrong(
    options: list[object], tmp_path: Path, more: list[str], expected: str
) -> None:
    tasks = [] if "--tasks" in more else ["--tasks", tmp_path / "mood.toml"]
    done = mp2(*options, "--out", tmp_path / "out", "--steps", 2, *tasks, *more)
    assert done.exit_code == 2
    assert expected in done.stderr
    assert not (tmp_path / "out").exists()


def test_pretrain_backbone_refuses_a_device_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("天气", "utf-8")
    done = mp2("pretrain-backbone", "--corpus", tmp_path, "--out", tmp_path / "out", "--device", "cdua")
    assert done.exit_code == 2
    assert "unknown device 'cdua'. Did you mean 'cuda'" in done.output
    assert not (tmp_path / "out").exists()

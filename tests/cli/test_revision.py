"""``--revision``: of hub checkpoints only, kept with what is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mp2.backbone import Backbone, load_backbone
from mp2.cli import main
from mp2.runs.config import BbtConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """What is asked of the hub, which answers with mini as of COMMIT."""
    calls: list[tuple[str, str | None]] = []

    def load(name: str | Path, *, revision: str | None = None) -> Backbone:
        if str(name) != "somebody/mini":
            return load_backbone(name, revision=revision)
        calls.append((str(name), revision))
        return replace(load_backbone("mini"), revision=COMMIT)

    for place in ("mp2.backbone", "mp2.export.by_name", "mp2.training.pretrain_run"):
        monkeypatch.setattr(f"{place}.load_backbone", load)
    return calls


def mp2(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


HUB = ("--backbone", "somebody/mini", "--revision", "v1")
COMMANDS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "export": lambda out: ("export", *HUB, "--out", out),
    "scratch": lambda out: ("scratch", *HUB, "--out", out),
    "pretrain": lambda out: ("pretrain", *HUB, "--out", out, "--tasks", "nothing-like-it"),
    "baselines": lambda out: ("baselines", *HUB, "--task", "demo_sentiment"),
    "tasks show": lambda out: ("tasks", "show", "demo_sentiment", *HUB),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_revision_is_what_is_loaded(
    asked: list[tuple[str, str | None]], tmp_path: Path, command: str
) -> None:
    mp2(*COMMANDS[command](str(tmp_path / "out")))
    assert asked == [("somebody/mini", "v1")]


def test_runs_keep_the_revision_and_the_commit_and_predict_asks_for_it(
    asked: list[tuple[str, str | None]], tmp_path: Path
) -> None:
    made = mp2(
        *(
            "bbt",
            "--task",
            "demo_sentiment",
            "--head",
            "span",
            *HUB,
            "--prompts",
            "mini-deep",
            "--iters",
            "20",
        ),
        *("--router-search", "none", "--no-test", "--json", "--out", str(tmp_path)),
    )
    assert made.exit_code == 0, made.output
    result = json.loads(made.stdout)
    assert result["backbone_revision"] == COMMIT
    saved = json.loads((Path(result["run_dir"]) / "config.json").read_text())
    assert (saved["config"]["revision"], saved["backbone_revision"]) == ("v1", COMMIT)
    text = tmp_path / "new.txt"
    text.write_text("\u5f88\u597d\n", "utf-8")
    run = ("predict", "--run", result["run_dir"], "--input", str(text))
    for more in ((), ("--revision", "v2"), ("--backbone", "mini")):
        done = mp2(*run, *more)
        assert done.exit_code == 0, done.output
    assert {revision for _, revision in asked} == {"v1", "v2"}


@pytest.mark.parametrize(
    "command",
    [
        *("bbt --task demo_sentiment --out", "tune --task demo_sentiment --out"),
        *("export --out", "scratch --out", "pretrain --out"),
        *("tasks check demo_sentiment", "tasks show demo_sentiment", "baselines --task demo_sentiment"),
    ],
)
def test_a_revision_of_a_local_backbone_is_refused(tmp_path: Path, command: str) -> None:
    out = [str(tmp_path / "out")] if command.endswith("--out") else []
    done = mp2(*command.split(), *out, "--backbone", "mini", "--revision", "v1")
    assert done.exit_code == 2
    assert "revision 'v1' was given, and backbone 'mini' is not from the hub" in done.output


def test_runs_from_before_there_was_a_revision_have_the_hash_that_they_had() -> None:
    plain = BbtConfig(task="tnews")
    values = plain.to_json()
    del values["revision"]
    assert BbtConfig.from_json(values).sha256() == plain.sha256()
    assert replace(plain, revision="v1").sha256() != plain.sha256()

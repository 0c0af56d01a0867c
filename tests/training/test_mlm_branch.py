"""``mp2 pretrain-backbone --from``: a run that goes on where another one is."""

from __future__ import annotations

from pathlib import Path

import pytest

from mp2.errors import FormatError, MismatchError, UsageError
from mp2.training import train_mlm
from mp2.training.mlm_trainer import MlmTrainer
from training.toy_mlm import corpus_of, losses, tiny
from training.toy_runs import cut_at


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return corpus_of(tmp_path / "corpus")


def test_a_branch_with_the_same_settings_takes_the_steps_of_the_whole_run(
    corpus: Path, tmp_path: Path
) -> None:
    steady = {"decay_steps": 0, "warmup_steps": 3}
    whole = train_mlm(corpus, tmp_path / "whole", tiny(steps=9, **steady), log=lambda _: None)
    train_mlm(corpus, tmp_path / "trunk", tiny(steps=5, **steady), log=lambda _: None)
    lines: list[str] = []
    branch = train_mlm(
        corpus, tmp_path / "branch", tiny(steps=9, **steady), start=tmp_path / "trunk", log=lines.append
    )
    assert any(line.startswith("branched at step 5 of ") for line in lines)
    assert branch.sha256 == whole.sha256
    assert losses(tmp_path / "branch") == losses(tmp_path / "whole")
    assert not (tmp_path / "branch" / "start.safetensors").exists()


def test_a_decaying_branch_leaves_the_trunk_as_it_was_and_resumes(corpus: Path, tmp_path: Path) -> None:
    trunk, config = tmp_path / "trunk", tiny(steps=9, warmup_steps=3, decay_steps=4, contrastive=0.1)
    train_mlm(corpus, trunk, tiny(steps=5, warmup_steps=3, decay_steps=0), log=lambda _: None)
    before = {path: path.read_bytes() for path in trunk.iterdir() if path.is_file()}
    unbroken = train_mlm(corpus, tmp_path / "unbroken" / "tiny", config, start=trunk, log=lambda _: None)
    out = tmp_path / "tiny"
    with cut_at(MlmTrainer, 8, 7), pytest.raises(KeyboardInterrupt):
        train_mlm(corpus, out, config, start=trunk, log=lambda _: None)
    resumed = train_mlm(corpus, out, config, start=trunk, log=lambda _: None)
    assert resumed.sha256 == unbroken.sha256
    assert losses(out) == losses(tmp_path / "unbroken" / "tiny")
    assert {path: path.read_bytes() for path in trunk.iterdir() if path.is_file()} == before


def test_a_folder_without_a_run_or_with_no_step_left_is_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"--from: there is no .*nowhere/mlm_checkpoint\.safetensors; give"):
        train_mlm(corpus, out, tiny(), start=tmp_path / "nowhere", log=lambda _: None)
    assert not out.exists()
    train_mlm(corpus, tmp_path / "trunk", tiny(steps=5), log=lambda _: None)
    with pytest.raises(
        UsageError, match=r"--steps 5, expected more than the 5 that the run in .*trunk has taken"
    ):
        train_mlm(corpus, out, tiny(steps=5), start=tmp_path / "trunk", log=lambda _: None)


def test_a_run_of_another_vocabulary_or_shape_is_refused(corpus: Path, tmp_path: Path) -> None:
    train_mlm(corpus, tmp_path / "trunk", tiny(steps=2), log=lambda _: None)
    with pytest.raises(MismatchError, match=r"the run in .*trunk has another vocabulary"):
        train_mlm(corpus, tmp_path / "a", tiny(vocab_size=150), start=tmp_path / "trunk", log=lambda _: None)
    with pytest.raises(FormatError, match="this checkpoint is of another model"):
        train_mlm(corpus, tmp_path / "b", tiny(ffn=32), start=tmp_path / "trunk", log=lambda _: None)

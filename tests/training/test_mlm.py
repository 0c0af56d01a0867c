"""Masked language modelling: masking, loss, schedule, and runs that are cut off."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

from mp2.backbone import Backbone, BackboneConfig, load_backbone, weights_sha256
from mp2.backbone.checkpoint import checkpoint_names
from mp2.errors import FormatError, LossError, MismatchError, RunLockedError, UsageError
from mp2.training import MlmConfig, train_mlm
from mp2.training.checkpoint import alone_in
from mp2.training.mlm import MaskedLanguageModel, schedule, sinusoids
from mp2.training.mlm_trainer import MlmTrainer
from training.toy_mlm import corpus_of, losses, tiny
from training.toy_runs import cut_at, kill_after


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return corpus_of(tmp_path / "corpus")


def train(corpus: Path, out: Path, config: MlmConfig, log: list[str] | None = None) -> Backbone:
    return train_mlm(corpus, out, config, log=([] if log is None else log).append)


# ---- loss, schedule


def test_the_loss_equals_transformers_masked_language_model() -> None:
    shape = BackboneConfig(
        name="x", n_layers=2, hidden=16, n_heads=2, ffn=24, vocab_size=50, max_positions=20
    )
    model = MaskedLanguageModel(shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.2, generator=generator)
    theirs = BertForMaskedLM(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=20,
        )
    ).eval()
    names = checkpoint_names(2)
    state = {f"bert.{names[n]}": t for n, t in model.encoder.state_dict().items()}
    state["cls.predictions.transform.dense.weight"] = model.transform.weight
    state["cls.predictions.transform.dense.bias"] = model.transform.bias
    state["cls.predictions.transform.LayerNorm.weight"] = model.transform_norm.weight
    state["cls.predictions.transform.LayerNorm.bias"] = model.transform_norm.bias
    state["cls.predictions.bias"] = model.bias
    state["cls.predictions.decoder.weight"] = model.encoder.word_embeddings.weight
    state["cls.predictions.decoder.bias"] = model.bias
    loaded = theirs.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert all("position_ids" in key for key in loaded.missing_keys)
    ids = torch.randint(5, 50, (3, 8), generator=generator)
    chosen = torch.tensor([1, 6, 9, 21])
    targets = torch.tensor([7, 8, 30, 49])
    for starts in ([0, 0, 0], [0, 12, 5]):
        positions = torch.tensor(starts)[:, None] + torch.arange(8)
        positions[:, 0] = 0
        with torch.no_grad():
            logits = theirs(input_ids=ids, position_ids=positions).logits.flatten(0, 1)[chosen]
            expected = torch.nn.functional.cross_entropy(logits.double(), targets)
            [got] = model(ids, chosen, targets, torch.tensor(starts))
        assert got.item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_rate_rises_to_the_peak_and_falls_to_nearly_nothing() -> None:
    rates = [schedule(step, 100, None, None) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 5)
    assert rates[4] == rates[5] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1 / 95)
    assert np.all(np.diff(rates[:5]) > 0)
    assert np.all(np.diff(rates[5:]) < 0)
    assert schedule(0, 1, None, None) == 1.0
    assert 0 < min(schedule(s, 7, 7, None) for s in range(7)) <= schedule(6, 7, 7, None) == 1.0


def test_the_rate_stays_at_the_peak_until_the_last_steps() -> None:
    rates = [schedule(step, 100, 5, 10) for step in range(100)]
    assert rates[4:91] == [1.0] * 87
    assert rates[90:] == pytest.approx([n / 10 for n in range(10, 0, -1)])
    assert rates[:90] == [schedule(step, 10_000, 5, 0) for step in range(90)]  # wherever the run may end


def test_positions_start_as_sines_and_cosines() -> None:
    table = sinusoids(40, 7)
    assert table.shape == (40, 7)
    for position in (0, 1, 39):
        for i in range(7):
            angle = position / 10_000 ** ((i - i % 2) / 7)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert table[position, i].item() == pytest.approx(expected, abs=1e-5)


def test_matrices_start_by_their_width_and_positions_as_large_as_words() -> None:
    shape = BackboneConfig(
        name="x", n_layers=1, hidden=192, n_heads=2, ffn=384, vocab_size=500, max_positions=100
    )
    model = MaskedLanguageModel(shape)
    model.initialise(torch.Generator().manual_seed(0))
    sizes = {name: p.square().mean().sqrt().item() for name, p in model.named_parameters() if p.dim() > 1}
    for name, size in sizes.items():
        if "token_type" not in name:  # two rows
            assert size == pytest.approx(0.02 if "embeddings" in name else 0.04, rel=0.05)


# ---- runs


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], str]:
    """Losses and weight hash of 14 steps on the fixture's corpus."""
    root = tmp_path_factory.mktemp("unbroken")
    backbone = train(corpus_of(root / "corpus"), root / "tiny", tiny())
    return losses(root / "tiny"), backbone.sha256


def test_a_run_writes_a_backbone_that_loads(
    corpus: Path, tmp_path: Path, unbroken: tuple[list[float], str]
) -> None:
    lines: list[str] = []
    backbone = train(corpus, tmp_path / "tiny", tiny(), lines)
    assert (losses(tmp_path / "tiny"), backbone.sha256) == unbroken  # same seed, same bits
    assert load_backbone(tmp_path / "tiny").sha256 == backbone.sha256
    assert backbone.config.vocab_size == backbone.tokenizer.vocab_size
    assert any("sequences of 16 tokens" in line for line in lines)
    assert any(line.startswith("step 14/14 loss") for line in lines)
    assert json.loads((tmp_path / "tiny" / "mlm_config.json").read_text())["steps"] == 14


def test_it_learns_to_read_the_context(tmp_path: Path) -> None:
    """Rows of one repeated character: alone a guess among 16, in context certain."""
    rng = np.random.default_rng(0)
    (tmp_path / "corpus").mkdir()
    rows = [str(c) * 14 for c in rng.choice(list("天气今日晴有雨旅游美食体育科技"), 400)]
    (tmp_path / "corpus" / "a.txt").write_text("\n".join(rows), "utf-8")
    config = tiny(steps=300, learning_rate=1e-2, checkpoint_minutes=9.0, batch_size=16, ppmi_init=False)
    train(tmp_path / "corpus", tmp_path / "tiny", config)
    values = losses(tmp_path / "tiny")
    assert np.mean(values[:3]) > 4.5  # ln(number of tokens) = 5.1
    assert np.mean(values[-20:]) < 0.7  # ln(16) = 2.8


def test_the_head_is_kept_under_names_that_transformers_reads(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "tiny", tiny())
    backbone = load_backbone(tmp_path / "tiny")
    assert backbone.mlm_head is not None
    assert backbone.mlm_head.bias.any()  # it was trained
    model = BertForMaskedLM.from_pretrained(tmp_path / "tiny").eval()
    ids = torch.arange(2, 14).view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
    got = backbone.mlm_head.logits(backbone.encoder(ids))
    assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("last_saved", "killed_at"), [(5, 5), (5, 9), (1, 14)])
def test_a_run_cut_off_after_a_checkpoint_goes_on_bit_for_bit(
    corpus: Path,
    tmp_path: Path,
    unbroken: tuple[list[float], str],
    last_saved: int,
    killed_at: int,
) -> None:
    with cut_at(MlmTrainer, killed_at, last_saved), pytest.raises(KeyboardInterrupt):
        train(corpus, tmp_path / "tiny", tiny())
    assert len(losses(tmp_path / "tiny")) == killed_at
    with (tmp_path / "tiny" / "mlm_losses.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # a torn line
    lines: list[str] = []
    backbone = train(corpus, tmp_path / "tiny", tiny(), lines)
    assert f"resumed at step {last_saved}" in lines
    assert (losses(tmp_path / "tiny"), backbone.sha256) == unbroken


MLM_PROGRAM = """
import sys, torch
from pathlib import Path
from mp2.training import MlmConfig, train_mlm
torch.set_num_threads(1)
train_mlm(Path(sys.argv[1]), Path(sys.argv[2]), MlmConfig(**eval(sys.argv[3])), log=print)
"""


def test_a_run_killed_by_sigkill_goes_on_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    from dataclasses import asdict

    config = tiny(steps=60)
    expected = train(corpus, tmp_path / "unbroken" / "tiny", config).sha256
    out = tmp_path / "tiny"
    process = subprocess.Popen(
        [sys.executable, "-c", MLM_PROGRAM, str(corpus), str(out), repr(asdict(config))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    kill_after(process, out / "mlm_losses.jsonl", 10)
    lines: list[str] = []
    assert train(corpus, out, config, lines).sha256 == expected
    assert any(line.startswith("resumed at step ") for line in lines)
    assert losses(out) == losses(tmp_path / "unbroken" / "tiny")


def test_non_finite_losses_are_skipped_counted_and_told(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = MlmTrainer.loss
    moved: list[str] = []

    def poisoned(self: MlmTrainer, batch: Any) -> torch.Tensor:
        moved.append(weights_sha256(self.model.encoder))
        return loss(self, batch) * (torch.nan if self.step in (3, 4) else 1.0)

    monkeypatch.setattr(MlmTrainer, "loss", poisoned)
    train(corpus, tmp_path / "tiny", tiny(steps=8))
    assert [i for i, value in enumerate(losses(tmp_path / "tiny")) if value is None] == [3, 4]
    assert moved[3] == moved[4] == moved[5] != moved[6]
    assert json.loads((tmp_path / "tiny" / "mlm_result.json").read_text())["skipped_steps"] == 2
    assert "2 steps had a non-finite loss" in (tmp_path / "tiny" / "model_card.md").read_text()


def test_ten_non_finite_losses_in_a_row_stop_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = MlmTrainer.loss
    monkeypatch.setattr(
        MlmTrainer, "loss", lambda self, b: loss(self, b) * (torch.inf if self.step > 1 else 1.0)
    )
    with pytest.raises(LossError, match=r"10 non-finite losses in a row at step 11; .*mlm_checkpoint"):
        train(corpus, tmp_path / "tiny", tiny())


@pytest.mark.parametrize("masking", ["span", "mixed"])
def test_other_masking_trains_other_positions(
    corpus: Path, tmp_path: Path, unbroken: tuple[list[float], str], masking: str
) -> None:
    backbone = train(corpus, tmp_path / "tiny", tiny(masking=masking))
    assert backbone.sha256 != unbroken[1]
    assert f"({masking} masking)" in (tmp_path / "tiny" / "model_card.md").read_text()


def test_the_contrastive_term_is_added_with_its_weight_and_told(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "tiny", tiny(steps=4, contrastive=0.3))
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "mlm_losses.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["contrastive"] > 0
        assert line["loss"] == pytest.approx(line["mlm"] + 0.3 * line["contrastive"], abs=1e-5)


def test_tiny_numbers_are_zero_while_it_trains_and_as_before_after(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halved() -> float:
        return float(torch.tensor(1e-39) * 0.5)

    seen = []
    after_step = MlmTrainer.after_step
    monkeypatch.setattr(MlmTrainer, "after_step", lambda run: (seen.append(halved()), after_step(run)))
    before = halved()
    train_mlm(corpus, tmp_path, tiny(steps=2), log=print)
    assert seen == [0.0, 0.0]
    assert halved() == before != 0.0


@pytest.mark.parametrize(("compiled", "expected"), [(None, 0), (False, 0), (True, 1)])
def test_the_model_is_compiled_where_asked(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool | None,
    expected: int,
    unbroken: tuple[list[float], str],
) -> None:
    seen: list[torch.nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model: seen.append(model) or model)
    backbone = train_mlm(corpus, tmp_path / "tiny", tiny(), log=lambda _: None, compiled=compiled)
    assert [type(model) for model in seen] == [MaskedLanguageModel] * expected
    assert backbone.sha256 == unbroken[1]


def test_the_card_names_the_texts_by_hash_and_the_losses(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    train_mlm(corpus, out, tiny(), log=lambda _: None, command="mp2 pretrain-backbone --steps 14")
    card = (out / "model_card.md").read_text()
    digest = hashlib.sha256((corpus / "a.txt").read_bytes()).hexdigest()
    assert f"| a.txt | {(corpus / 'a.txt').stat().st_size:,} | `{digest[:16]}` |" in card
    assert f"{losses(out)[0]:.3f} over the first twentieth" in card
    assert "mp2 pretrain-backbone --steps 14" in card
    assert "Seed 3; 1 process on cpu" in card
    assert "purely self-supervised" in card
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((out / "mlm_result.json").read_text())
    assert numbers["tokens_per_s"] > 0
    assert 0 <= numbers["data_wait_share"] <= 1


def test_a_finished_run_started_again_trains_no_more(corpus: Path, tmp_path: Path) -> None:
    first = train(corpus, tmp_path / "tiny", tiny(steps=4))
    before = losses(tmp_path / "tiny")
    assert train(corpus, tmp_path / "tiny", tiny(steps=4)).sha256 == first.sha256
    assert losses(tmp_path / "tiny") == before


def test_a_checkpoint_of_other_settings_is_refused(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "tiny", tiny(steps=2))
    with pytest.raises(MismatchError, match=r"mlm_checkpoint\.safetensors was made with .*: steps; give"):
        train(corpus, tmp_path / "tiny", tiny(steps=3))
    with pytest.raises(MismatchError, match=r": ffn, steps; give"):
        train(corpus, tmp_path / "tiny", tiny(steps=3, ffn=32))


def test_a_checkpoint_of_another_corpus_is_refused_before_anything_is_written(
    corpus: Path, tmp_path: Path
) -> None:
    with cut_at(MlmTrainer, 3), pytest.raises(KeyboardInterrupt):
        train(corpus, tmp_path / "tiny", tiny())
    text = (corpus / "a.txt").read_text("utf-8")
    before = {path: path.read_bytes() for path in (tmp_path / "tiny").glob("*") if path.is_file()}
    swapped = text.translate(str.maketrans("天气", "气天"))  # as many sequences, of the same characters
    (corpus / "a.txt").write_text(swapped, "utf-8")
    with pytest.raises(MismatchError, match="other settings, data or backbone: corpus; give"):
        train(corpus, tmp_path / "tiny", tiny())
    assert {path: path.read_bytes() for path in (tmp_path / "tiny").glob("*") if path.is_file()} == before
    (corpus / "a.txt").write_text(text, "utf-8")
    lines: list[str] = []
    train(corpus, tmp_path / "tiny", tiny(), lines)
    assert "resumed at step 3" in lines


def stopped_before_its_first_checkpoint(corpus: Path, out: Path, config: MlmConfig) -> None:
    def fails(self: MlmTrainer) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MlmTrainer, "train", fails)
        with pytest.raises(KeyboardInterrupt):
            train(corpus, out, config)
    assert (out / "vocab.txt").is_file()
    assert not (out / "mlm_checkpoint.safetensors").exists()


@pytest.mark.parametrize("change", ["vocab_size", "corpus", "nothing"])
def test_a_vocabulary_without_a_checkpoint_is_made_anew_for_other_text_or_size(
    corpus: Path, tmp_path: Path, change: str
) -> None:
    stopped_before_its_first_checkpoint(corpus, tmp_path / "tiny", tiny())
    config = tiny(vocab_size=190) if change == "vocab_size" else tiny()
    if change == "corpus":
        text = (corpus / "a.txt").read_text("utf-8")
        (corpus / "a.txt").write_text(text.replace("天", "地"), "utf-8")
    lines: list[str] = []
    backbone = train(corpus, tmp_path / "tiny", config, lines)
    assert any("made anew" in line for line in lines) == (change != "nothing")
    fresh = train(corpus, tmp_path / "fresh" / "tiny", config)
    assert backbone.tokenizer.tokens() == fresh.tokenizer.tokens()
    assert backbone.sha256 == fresh.sha256
    assert load_backbone(tmp_path / "tiny").tokenizer.tokens() == fresh.tokenizer.tokens()


def test_a_vocabulary_of_something_else_is_neither_taken_nor_overwritten(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tiny"
    out.mkdir()
    (out / "vocab.txt").write_text("[PAD]\n[UNK]\n", "utf-8")
    with pytest.raises(
        UsageError, match=r"tiny/vocab\.txt is there already .*--vocab-size 200; give another"
    ):
        train(corpus, out, tiny())
    assert (out / "vocab.txt").read_text("utf-8") == "[PAD]\n[UNK]\n"
    train(corpus, tmp_path / "done", tiny(steps=2))
    (
        tmp_path / "done" / "mlm_checkpoint.safetensors"
    ).unlink()  # the run has ended: it is not needed any more
    with pytest.raises(
        UsageError, match=r"done/vocab\.txt is there already .*--vocab-size 190; give another"
    ):
        train(corpus, tmp_path / "done", tiny(steps=2, vocab_size=190))


def test_a_checkpoint_without_a_parameter_is_refused(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "tiny", tiny(steps=2))
    path = tmp_path / "tiny" / "mlm_checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["model.encoder.word_embeddings.weight"]
    state = {name: x for name, x in json.loads(metadata["state"]).items() if name != "sha256"}
    save_file(tensors, path, {"state": json.dumps(state)})  # as one that was written without a checksum
    with pytest.raises(FormatError, match=r"'encoder\.word_embeddings\.weight' has nothing, expected shape"):
        train(corpus, tmp_path / "tiny", tiny(steps=2))


def test_a_second_run_in_the_same_folder_is_refused(corpus: Path, tmp_path: Path) -> None:
    with alone_in(tmp_path / "tiny"), pytest.raises(RunLockedError, match=f"training in {tmp_path / 'tiny'}"):
        train(corpus, tmp_path / "tiny", tiny(steps=2))


def test_a_damaged_checkpoint_is_a_format_error(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "tiny", tiny(steps=2))
    path = tmp_path / "tiny" / "mlm_checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError, match=r"mlm_checkpoint\.safetensors: not a training checkpoint"):
        train(corpus, tmp_path / "tiny", tiny(steps=2))


def test_a_corpus_smaller_than_a_batch_is_refused_with_both_numbers(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"corpus has \d+ sequences, expected at least one batch of 5000"):
        train(corpus, tmp_path / "tiny", tiny(batch_size=5000))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"length": 33}, "length is 33, expected at most 32"),
        ({"length": 2}, "length is 2, expected at least 3"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"mask_rate": 1.0}, r"mask_rate is 1\.0"),
        ({"masking": "word"}, r"unknown masking 'word'\. Known: char, span, mixed"),
        ({"warmup_steps": -1}, "warmup_steps is -1, expected at least 0"),
        ({"decay_steps": -2}, "decay_steps is -2, expected at least 0"),
        ({"contrastive": -0.5}, r"contrastive is -0\.5, expected a weight of 0 or more"),
        ({"contrastive": 0.1, "batch_size": 7}, "batch_size is 7, expected an even one"),
        ({"learning_rate": 0.0}, r"lr is 0\.0"),
        ({"checkpoint_minutes": -1.0}, r"checkpoint_minutes is -1\.0"),
        ({"checkpoint_minutes": float("inf")}, "checkpoint_minutes is inf"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"batch_size": -2}, "batch_size is -2, expected at least 1"),
        ({"n_layers": 0}, "layers is 0, expected at least 1"),
        ({"hidden": 15}, "hidden is 15, expected a multiple of the 2 heads"),
        ({"seed": -1}, "seed is -1, expected 0 to"),
    ],
)
def test_bad_settings_name_the_value(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        tiny(**changes)

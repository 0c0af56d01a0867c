from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed import pretrain_speed
from benchmarks.speed.engine_work import shaped_backbone
from benchmarks.speed.plain_training import PlainTraining
from benchmarks.speed.pretrain_speed import measure
from mp2.tasks import load_card
from mp2.training import Pretrainer
from mp2.training.mixture import Batch, load_mixture


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_both_loops_get_the_same_batches_in_the_same_order_and_alternate(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = shaped_backbone(1, 32, 2)
    cards = [load_card(name) for name in ("demo_sentiment", "demo_topic")]
    tasks = load_mixture(cards, None, backbone.tokenizer, 128, dev_limit=1, log=print)
    seen: list[tuple[str, Batch]] = []
    ours, theirs = Pretrainer.train_step, PlainTraining.step

    def train_step(run: Pretrainer, batch: Batch) -> Any:
        seen.append(("ours", batch))
        return ours(run, batch)

    def step(plain: PlainTraining, batch: Batch) -> float:
        seen.append(("plain", batch))
        return theirs(plain, batch)

    monkeypatch.setattr(Pretrainer, "train_step", train_step)
    monkeypatch.setattr(PlainTraining, "step", step)
    monkeypatch.setattr(pretrain_speed, "matrix_rate", lambda device, precision: 1e9)
    args = Namespace(device="cpu", precision="fp32", rounds=3, steps=2)
    row = measure("tiny", kind, tasks, backbone, args)
    first, second = ["ours", "ours", "plain", "plain"], ["plain", "plain", "ours", "ours"]
    assert [who for who, _ in seen] == first + second + first + second
    of = {who: [batch for name, batch in seen if name == who] for who in ("ours", "plain")}
    for a, b in zip(of["ours"], of["plain"], strict=True):
        assert a.task == b.task
        for x, y in zip(_tensors(a), _tensors(b), strict=True):
            assert torch.equal(x, y)
    assert len({batch.input_ids.sum().item() for batch in of["ours"]}) == 8  # and no batch twice
    assert row["steps_timed"] == 6  # the first round warms up
    for key in ("ours_examples_per_s", "plain_examples_per_s", "ratio", "ours_share_of_matrix_rate"):
        assert len(row[key]["rounds"]) == 3
        assert 0 < row[key]["min"] <= row[key]["median"] <= row[key]["max"]
    assert row["loss_difference"] < 1e-5


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch.input_ids, batch.mask, batch.start, batch.end, batch.weight]

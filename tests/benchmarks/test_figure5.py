"""Figure 5: planted groups are found, chance is called chance, the picture and the numbers are written."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.paper import figure5
from mp2.backbone import Backbone
from mp2.errors import UsageError
from mp2.prompts import random_prompts, save_prompts

TASKS = [
    "waimai",
    "online_shopping",
    "weibo_sentiment",
    "thucnews",
    "toutiao_tc",
    "nlpcc2017_news",
    "bq",
    "lcqmc",
]


def rand_index(a: list[int], b: list[int]) -> float:
    """Adjusted Rand index from pairs (Hubert and Arabie 1985), the slow way."""
    both = sum(a[i] == a[j] and b[i] == b[j] for i, j in combinations(range(len(a)), 2))
    in_a = sum(a[i] == a[j] for i, j in combinations(range(len(a)), 2))
    in_b = sum(b[i] == b[j] for i, j in combinations(range(len(b)), 2))
    expected = in_a * in_b / comb(len(a), 2)
    return (both - expected) / ((in_a + in_b) / 2 - expected)


def test_planted_families_are_found_and_unlikely_by_chance() -> None:
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2, (3, 40))
    families = ["a"] * 5 + ["b"] * 5 + ["c"] * 5
    routers = centres[[ord(f) - ord("a") for f in families]].astype(float)
    flips = rng.random(routers.shape) < 0.1
    routers[flips] = 1 - routers[flips]
    found = figure5.cluster([str(i) for i in range(15)], families, routers, "hard", shuffles=500, seed=0)
    assert found.agreement == 1.0
    assert found.p == pytest.approx(1 / 501)
    assert abs(found.shuffled.mean()) < 0.03


def test_agreement_is_the_adjusted_rand_index_of_clusters_and_families() -> None:
    rng = np.random.default_rng(1)
    families = list("aabbbccdde")
    routers = rng.integers(0, 2, (10, 6)).astype(float)
    found = figure5.cluster([str(i) for i in range(10)], families, routers, "hard", shuffles=50, seed=0)
    expected = rand_index(found.clusters, [ord(f) for f in families])
    assert found.agreement == pytest.approx(expected)


def test_random_routers_are_not_significant_more_often_than_they_should() -> None:
    rng = np.random.default_rng(2)
    families = list("aaaabbbbccccdddd")
    small = 0
    for _ in range(60):
        routers = rng.integers(0, 2, (16, 32)).astype(float)
        small += figure5.cluster(families, families, routers, "hard", shuffles=99, seed=3).p <= 0.1
    assert small <= 14  # expected 6; beyond 14 has a probability of about 0.001


def test_twins_and_unknown_tasks_are_left_out(tiny_backbone: Backbone) -> None:
    tasks = ("waimai", "waimai_rotated", "waimai_flipped", "my_task", "bq")
    prompts = random_prompts(
        tiny_backbone, "deep", n_modules=2, prompt_tokens=2, intrinsic_dim=3, tasks=tasks
    )
    names, routers = figure5.routers_of(prompts, "hard")
    assert names == ["waimai", "bq"]
    expected = (prompts.routers[[0, 4]] > 0).flatten(1).numpy()
    assert np.array_equal(routers.astype(bool), expected)
    soft = figure5.routers_of(prompts, "soft")[1]
    assert ((soft > 0) & (soft < 1)).all()


def test_too_few_tasks_or_families_are_refused() -> None:
    with pytest.raises(UsageError, match="2 tasks of 2 families"):
        figure5.cluster(["a", "b"], ["x", "y"], np.eye(2), "hard", shuffles=5, seed=0)
    with pytest.raises(UsageError, match="3 tasks of 1 families"):
        figure5.cluster(["a", "b", "c"], ["x"] * 3, np.eye(3), "hard", shuffles=5, seed=0)


@pytest.mark.parametrize("weights", ["hard", "soft"])
def test_command_writes_picture_and_numbers(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    prompts = random_prompts(
        tiny_backbone, "shallow", n_modules=8, prompt_tokens=2, intrinsic_dim=3, tasks=tuple(TASKS)
    )
    by_family = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    logits = torch.where(torch.arange(8)[None] % 3 == by_family[:, None], 1.0, -1.0)
    save_prompts(replace(prompts, routers=logits[:, None]), tmp_path / "p.safetensors")
    command = ["figure5", "--prompts", str(tmp_path / "p.safetensors"), "--router", weights]
    monkeypatch.setattr(sys, "argv", [*command, "--shuffles", "200", "--out", str(tmp_path)])
    figure5.main()
    found = json.loads((tmp_path / "figure5.json").read_text())["rows"][0]
    assert (found["tasks"], found["families"], found["clusters"]) == (8, 3, 3)
    assert found["adjusted_rand_index"] == 1.0
    assert found["distinct_routers"] == 3
    assert found["by_task"]["bq"]["family"] == "sentence matching"
    assert found["shuffled"]["p"] < 0.05
    assert (tmp_path / "figure5_shallow.png").read_bytes().startswith(b"\x89PNG")

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.speed.engine_work import make_backbone, make_prompts, task_inputs
from benchmarks.speed.rivals import RIVALS, Rival
from mp2.engine import Objective, create_backend


@pytest.mark.parametrize("kind", RIVALS)
def test_rivals_have_the_losses_of_the_engine(kind: str, tmp_path: Path) -> None:
    backbone = make_backbone("mini")
    prompts = make_prompts("mini", backbone)
    inputs = task_inputs("demo_topic", backbone, None, 7)
    z = prompts.fuse(torch.ones(prompts.z.shape[:2])).numpy()
    trial = z[:, None] + 0.1 * np.random.default_rng(0).standard_normal((len(z), 3, z.shape[1]))
    objective = Objective(create_backend("torch", backbone).forward(prompts), inputs)
    rival = Rival(kind, backbone, prompts, inputs)
    for each in (objective, rival):
        each.set_incumbent(z)
    for layer in (0, 1, 3, 2, 0):  # upwards as stage II visits, and back
        expected = objective.layer_losses(layer, trial[layer]).fetch()
        np.testing.assert_allclose(rival.layer_losses(layer, trial[layer]), expected, rtol=2e-5)
        for each in (objective, rival):
            each.commit(layer, trial[layer, 0])
    if kind != "A":
        lengths = {x.n_tokens for x in inputs}
        assert sorted(bucket.ids.shape[1] for bucket in rival._buckets) == sorted(lengths)
        assert all(bucket.mask is None for bucket in rival._buckets)


def test_c_computes_no_layer_below_the_visited_one_twice() -> None:
    backbone = make_backbone("mini")
    prompts = make_prompts("mini", backbone)
    inputs = task_inputs("demo_topic", backbone, None, 2)
    z = prompts.fuse(torch.ones(prompts.z.shape[:2])).numpy()
    counts = {}
    for kind in ("B", "C"):
        rival = Rival(kind, backbone, prompts, inputs)
        rival.set_incumbent(z)
        rival.layer_losses(3, z[3:4])
        rows = 0
        plain = rival._layer

        def counting(index: int, *rest: object, plain: object = plain) -> torch.Tensor:
            nonlocal rows
            rows += 1
            return plain(index, *rest)  # type: ignore[operator, no-any-return]

        rival._layer = counting  # type: ignore[method-assign, assignment]
        rival.layer_losses(3, z[3:4])
        counts[kind] = rows // len(rival._buckets)
    assert counts == {"B": 6, "C": 3}  # layers 3 to 5

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.speed.forward_parts import CUSTOM, measured
from benchmarks.speed.python_share import outside
from mp2.engine.cpu import attention, native


def test_parts_hold_the_operators_time_and_not_the_python_between() -> None:
    a = torch.randn(400, 400)
    with measured() as parts:
        a @ a
        time.sleep(0.2)
        a + a
    assert parts.calls["aten.mm.default"] == 1
    assert sum(parts.seconds.values()) < 0.15


@pytest.mark.skipif(native.load() is None, reason="no C compiler here")
def test_c_kernels_are_parts() -> None:
    qkv = torch.randn(2, 3, 5, 3, 2, 32)
    expected = attention.attend(qkv, None, None)
    with measured() as parts:
        found = attention.attend(qkv, None, None)
    assert torch.equal(found, expected)
    assert parts.calls[CUSTOM + "mp2_attend"] == 1
    assert not isinstance(native.load(), type(None))


def test_all_but_forwards_counts_as_outside() -> None:
    seconds = {"stage1": 6.0, "stage2": 4.0, "forward": 9.7, "suggest": 0.1, "journal": 0.05, "other": 0.15}
    assert outside(seconds)["outside_share"] == pytest.approx(0.03)

from __future__ import annotations

import pytest
import torch

from mp2.backbone import resolve_device
from mp2.errors import MissingDependencyError, UnknownNameError


def test_cpu_is_a_device() -> None:
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cdua", "nonsense", "meta"])
def test_what_is_no_device_is_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown device '{name}'"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.device_count() > 63, reason="a machine with that many GPUs")
def test_a_gpu_that_is_not_there_says_what_to_do() -> None:
    with pytest.raises(MissingDependencyError, match=r"'cuda:63' is not there.*--device cpu"):
        resolve_device("cuda:63")

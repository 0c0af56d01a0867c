"""A file is there whole or not at all: what was there before stays until all of the new is on the disk."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mp2.files import whole_file, write_json, write_tensors, write_text


def test_a_failed_block_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "旧\n")

    def stopped() -> None:
        with whole_file(path) as partial:
            partial.write_text("half", "utf-8")
            assert path.read_text("utf-8") == "旧\n"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text("utf-8") == "旧\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_was_taken_away_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(FileNotFoundError), whole_file(path) as partial:
        partial.unlink()
    assert not path.exists()


def test_a_number_that_is_not_finite_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.5, "task": "情感"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text("utf-8")) == {"loss": 1.5, "task": "情感"}


def test_tensors_that_share_memory_or_are_views_are_written_as_they_look(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    matrix = torch.arange(6.0).reshape(2, 3).requires_grad_()
    write_tensors(path, {"matrix": matrix, "turned": matrix.T}, {"state": "{}"})
    found = load_file(path)
    assert torch.equal(found["matrix"], matrix.detach())
    assert torch.equal(found["turned"], matrix.detach().T)

"""What a refused training leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from mp2.errors import UsageError
from mp2.training.checkpoint import Preparation, alone_in


def refuse(out: Path, before: Preparation) -> None:
    """Put something into the folder and find that the run cannot be."""
    with alone_in(out), before.undone():
        (out / "cache").mkdir()
        (out / "cache" / "packed.npy").write_text("ours")
        raise UsageError("no text")


@pytest.mark.parametrize("there", [False, True])
def test_a_refusal_leaves_the_folder_as_it_was(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "new" / "out"
    if there:
        out.mkdir(parents=True)
        (out / "mine.txt").write_text("kept")
    before = Preparation(out)
    with pytest.raises(UsageError, match="no text"):
        refuse(out, before)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == (["new", "new/out", "new/out/mine.txt"] if there else [])


def test_what_another_process_left_before_the_folder_was_ours_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = Preparation(out)
    out.mkdir()
    (out / "model.safetensors").write_text("another training's, finished while we began")
    with pytest.raises(UsageError, match="no text"):
        refuse(out, before)
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]

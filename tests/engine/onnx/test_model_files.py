"""What is loaded is what was read and checked, whatever becomes of the files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from mp2.engine.folder import EngineFolder
from mp2.engine.onnx.model_files import load_session, read_model
from mp2.errors import FormatError


@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "from a private copy"])
def test_a_session_is_made_of_what_was_read(engine_dir: Path, tmp_path: Path, in_memory: bool) -> None:
    folder = EngineFolder.open(shutil.copytree(engine_dir, tmp_path / "engine"))
    feeds = {"input_ids": np.array([[5, 6, 7]]), "n_inline": np.array(0)}
    (expected,) = ort.InferenceSession(engine_dir / "embed.onnx").run(None, feeds)
    model = read_model(folder, "embed.onnx")
    shutil.rmtree(folder.path)
    session = load_session(model, ort.SessionOptions(), {}, in_memory=in_memory)
    np.testing.assert_array_equal(session.run(None, feeds)[0], expected)


def test_a_private_copy_is_nobody_elses_and_does_not_stay(engine_dir: Path) -> None:
    with read_model(EngineFolder.open(engine_dir), "embed.onnx").on_disk() as path:
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert sorted(file.name for file in path.parent.iterdir()) == ["embed.bin", "embed.onnx"]
    assert not path.parent.exists()


def test_what_changed_since_the_folder_was_checked_is_not_loaded(engine_dir: Path, tmp_path: Path) -> None:
    folder = EngineFolder.open(shutil.copytree(engine_dir, tmp_path / "engine"))
    data = bytearray((folder.path / "embed.bin").read_bytes())
    data[7] ^= 1
    (folder.path / "embed.bin").write_bytes(data)
    with pytest.raises(FormatError, match=r"embed\.bin: sha256 is"):
        read_model(folder, "embed.onnx")

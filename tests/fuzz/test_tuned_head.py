"""The tensors of a fitted head beside a tuned prompt."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from fuzz.campaign import campaign, damaged_bytes, damaged_tensors
from fuzz.test_run_files import META
from mp2.backbone import Backbone
from mp2.heads import FittedRidge
from mp2.heads.ridge import RidgePart, RidgeSettings
from mp2.runs.tuned import load_tuned, save_tuned, tuned_head


def test_ridge_head(tmp_path: Path, tiny_backbone: Backbone) -> None:
    path = tmp_path / "prompt.safetensors"
    head = {"ridge_state_weight": np.ones((24, 2)), "ridge_bias": np.zeros(2)}
    parts = (RidgePart(share=1.0, penalty=1.0, weight=1.0),)
    settings = asdict(RidgeSettings(layer=1, ngrams=False, parts=parts))
    meta = replace(META, head={"kind": "ridge", **settings})
    save_tuned(path, np.zeros((2, 3), np.float32), meta, head)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        _, meta = load_tuned(path)
        if meta.head.get("kind") == "ridge":
            found = tuned_head(path, meta, tiny_backbone, None, ())  # type: ignore[arg-type]
            assert isinstance(found, FittedRidge)
            assert np.isfinite(found.state_weight).all()
            assert 0 <= found.layer <= 3

    campaign("ridge head", path.read_bytes(), read, (damaged_bytes, damaged_tensors, damaged_tensors))

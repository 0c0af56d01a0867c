"""Every backend adds the backbone's own token type: CPT was trained with type 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from tiny_words import tiny_vocab

from mp2.backbone import Backbone, BackboneConfig, random_backbone
from mp2.engine import Backend, Objective, create_backend
from mp2.engine.cuda.backend import CudaBackend
from mp2.engine.folder import read_manifest
from mp2.export import export_engine
from mp2.prompts import random_prompts

from .slow_reference import make_inputs


def losses(kind: str, backbone: Backbone, prompts_of: Literal["deep", "shallow"], folder: Path) -> np.ndarray:
    backend: Backend
    if kind == "onnxruntime":
        export_engine(backbone, folder)
        assert read_manifest(folder / "manifest.json").backbone.token_type == backbone.config.token_type
        backend = create_backend("onnxruntime", backbone, engine_dir=folder)
    elif kind == "cuda":
        backend = CudaBackend(backbone, device="cpu", precision="fp32")  # the same code, on the CPU
    else:
        backend = create_backend(kind, backbone)
    prompts = random_prompts(backbone, prompts_of, n_modules=2, prompt_tokens=3, intrinsic_dim=6, seed=1)
    train = make_inputs((9, 14, 5, 11), backbone.config.vocab_size, seed=3)
    objective = Objective(backend.forward(prompts), train)
    z = torch.randn(2, *prompts.z.mean(1).shape, generator=torch.Generator().manual_seed(0)).numpy()
    return objective.full_losses(z).fetch()


@pytest.mark.parametrize("prompts_of", ["deep", "shallow"])
@pytest.mark.parametrize("kind", ["torch", "cuda", "onnxruntime"])
def test_token_type_1_equals_type_0_over_a_table_with_its_rows_exchanged(
    tiny_config: BackboneConfig, tmp_path: Path, kind: str, prompts_of: Literal["deep", "shallow"]
) -> None:
    one = random_backbone(replace(tiny_config, token_type=1), tiny_vocab(), seed=7)
    zero = random_backbone(tiny_config, tiny_vocab(), seed=7)
    assert one.sha256 != zero.sha256
    same = losses(kind, zero, prompts_of, tmp_path / "zero")
    with torch.no_grad():
        table = zero.encoder.token_type_embeddings.weight
        table.copy_(table.flip(0))
    got = losses(kind, one, prompts_of, tmp_path / "one")
    np.testing.assert_array_equal(got, losses(kind, zero, prompts_of, tmp_path / "exchanged"))
    assert not np.allclose(got, same, rtol=1e-6)

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
from mp2.engine import create_objective, create_runtime
from mp2.engine.cuda.runtime import CudaRuntime
from mp2.engine.folder import read_manifest
from mp2.export import export_engine
from mp2.prompts import random_prompts

from .slow_reference import make_inputs


def losses(kind: str, backbone: Backbone, prompts_of: Literal["deep", "shallow"], folder: Path) -> np.ndarray:
    if kind == "onnxruntime":
        export_engine(backbone, folder)
        assert read_manifest(folder / "manifest.json").backbone.token_type == backbone.config.token_type
        runtime = create_runtime("onnxruntime", backbone, engine_dir=folder)
    elif kind == "cuda":
        runtime = CudaRuntime(backbone, device="cpu")  # the same code, on the CPU
    else:
        runtime = create_runtime(kind, backbone)
    prompts = random_prompts(backbone, prompts_of, n_modules=2, prompt_tokens=3, intrinsic_dim=6, seed=1)
    train = make_inputs((9, 14, 5, 11), backbone.config.vocab_size, seed=3)
    objective = create_objective(runtime, backbone, prompts, train)
    z = torch.randn(2, *prompts.z.mean(1).shape, generator=torch.Generator().manual_seed(0)).numpy()
    return np.asarray(objective.full_losses(z))


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

"""Modular prompts: a safetensors file and its metadata."""

from __future__ import annotations

from pathlib import Path

import torch

from fuzz.campaign import campaign, damaged_bytes, damaged_tensors
from mp2.backbone import Backbone
from mp2.prompts import load_prompts, random_prompts, save_prompts


def test_prompt_file(tmp_path: Path, tiny_backbone: Backbone) -> None:
    path = tmp_path / "p.safetensors"
    prompts = random_prompts(
        tiny_backbone, "deep", n_modules=2, prompt_tokens=2, intrinsic_dim=3, tasks=("a", "b")
    )
    save_prompts(prompts, path)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = load_prompts(path, tiny_backbone)
        for name, shape in found.meta.shapes().items():
            tensor = getattr(found, name)
            assert (tuple(tensor.shape), tensor.dtype) == (shape, torch.float32)
            assert torch.isfinite(tensor).all()

    campaign("prompt file", path.read_bytes(), read, (damaged_bytes, damaged_tensors, damaged_tensors))

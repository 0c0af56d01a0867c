"""Whether the installed onnxruntime runs `mp2.export.onnx_cpu_graphs`' graphs, and as the standard ones."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from mp2.backbone import BackboneConfig
from mp2.engine.onnx.session import OnnxSession
from mp2.export.graphs import layer_model
from mp2.export.onnx_cpu_graphs import CpuGraphBuilder, cpu_layer

_TOLERANCE = 1e-4
_P, _N, _T, _M = 3, 2, 7, 4  # candidates, examples, tokens, prompt rows


@functools.cache
def cpu_graphs_problem() -> str:
    """Return why the graphs cannot be used here, in one line; empty where they can.

    A small layer is run both ways: several texts and one, padded and not, with a prefix and without.
    """
    config = BackboneConfig(
        name="probe", n_layers=1, hidden=16, n_heads=2, ffn=32, vocab_size=8, max_positions=8
    )
    weights = _random_weights(config)
    nowhere = Path()
    standard, fused = (
        model.SerializeToString()
        for model in (
            layer_model(CpuGraphBuilder(config, nowhere, weights), 0),
            cpu_layer(CpuGraphBuilder(config, nowhere, weights), 0),
        )
    )
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(_T)[None] < torch.tensor([[_T], [_T - 3]])
    try:
        sessions = [OnnxSession(model, threads=1) for model in (standard, fused)]
        for texts, prefixes, m in ((_P, 1, _M), (_P, 1, 0), (_P, _P, _M), (1, _P, _M)):
            hidden = torch.randn(texts, _N, _T, config.hidden, generator=rng)
            shape = (2, prefixes, 1, config.n_heads, m, config.head_size)
            keys, values = torch.randn(shape, generator=rng)
            for seen in (mask, torch.ones_like(mask)):
                feeds = {"hidden": hidden, "mask": seen, "prefix_keys": keys, "prefix_values": values}
                size = (_P, _N, _T, config.hidden)
                expected, got = (session.run(feeds, {"hidden_out": size})[0] for session in sessions)
                error = float((expected - got).abs()[:, seen].max())
                if not error <= _TOLERANCE:
                    return f"fused attention is wrong here by {error:.1e}"
    except Exception as error:  # onnxruntime's own, which have no common base
        return f"no fused attention here ({str(error).splitlines()[0][:120]})"
    return ""


def _random_weights(config: BackboneConfig) -> dict[str, onnx.TensorProto]:
    rng = np.random.default_rng(0)
    width, ffn = config.hidden, config.ffn
    linear = {
        "qkv": (width, 3 * width),
        "attention_output": (width, width),
        "intermediate": (width, ffn),
        "output": (ffn, width),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[1:]}
    for name in ("attention_norm", "output_norm"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {
        f"layers.0.{name}": numpy_helper.from_array(
            (rng.standard_normal(shape) / 4).astype(np.float32), f"layers.0.{name}"
        )
        for name, shape in shapes.items()
    }

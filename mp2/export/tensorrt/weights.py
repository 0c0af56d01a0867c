"""Weights of a typed engine: half precision, or float8 with one scale a tensor, beside float32 norms."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mp2.backbone import Backbone, Layer
from mp2.engine.folder import layer_file
from mp2.export.weights import WeightStore

FP8_MAX = 448.0  # largest finite float8 e4m3fn
LINEARS = ("qkv", "attention_output", "intermediate", "output")
TORCH_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float16}
_SMALLEST_SCALE = 2.0**-14  # smallest normal float16: scales are stored in the graph's half type

InputMaxima = Mapping[str, float]
"""``layers.<i>.<linear>`` -> largest magnitude of that layer's input over the calibration texts."""


def fp8_scale(largest: float) -> torch.Tensor:
    """Return the float16 scale that puts ``largest`` at the end of float8's range."""
    return torch.tensor(max(largest / FP8_MAX, _SMALLEST_SCALE), dtype=torch.float16)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``x / scale``, clamped to float8's range, as float8 e4m3fn (round to nearest even)."""
    return (x.float() / scale.float()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def store_layer(
    backbone: Backbone, store: WeightStore, index: int, precision: str, maxima: InputMaxima | None
) -> None:
    """Write layer ``index`` for ``precision``; ``fp8`` needs the ``maxima`` of the layers' inputs."""
    layer, file, name = backbone.encoder.layers[index], layer_file(index, "bin"), f"layers.{index}"
    assert isinstance(layer, Layer)
    half = TORCH_TYPES[precision]
    scale = backbone.config.head_size**-0.5  # folded into the query's weights
    parts = ((layer.query, scale), (layer.key, 1.0), (layer.value, 1.0))
    with torch.no_grad():
        weights = {
            "qkv": (
                torch.cat([part.weight * factor for part, factor in parts]),
                torch.cat([part.bias * factor for part, factor in parts]),
            ),
            **{part: (getattr(layer, part).weight, getattr(layer, part).bias) for part in LINEARS[1:]},
        }
        for part, (weight, bias) in weights.items():
            at = f"{name}.{part}"
            transposed = weight.T.contiguous()
            if precision == "fp8":
                assert maxima is not None
                weight_scale = fp8_scale(float(weight.abs().max()))
                transposed = quantize(transposed, weight_scale)
                store.add_tensor(file, f"{at}.weight_scale", weight_scale)
                store.add_tensor(file, f"{at}.input_scale", fp8_scale(maxima[at]))
            else:
                transposed = transposed.to(half)
            store.add_tensor(file, f"{at}.weight", transposed)
            store.add_tensor(file, f"{at}.bias", bias.to(half))
        for part in ("attention_norm", "output_norm"):
            module = getattr(layer, part)
            store.add(file, f"{name}.{part}.weight", module.weight.numpy())
            store.add(file, f"{name}.{part}.bias", module.bias.numpy())

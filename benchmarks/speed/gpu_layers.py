"""Where a packed layer's time goes: its parts one by one, and the kernels that ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.speed.engine_work import seconds
from mp2.engine.cuda.backend import CudaBackend
from mp2.engine.cuda.forward import PackedForward
from mp2.tasks import MrcInput

_RUNS = 10


@torch.inference_mode()
def layer_parts(
    engine: CudaBackend, forward: PackedForward, inputs: Sequence[MrcInput], z: np.ndarray
) -> dict[str, float]:
    """Return milliseconds of each part of layer 0 for candidates ``z`` [P, d] over ``inputs`` in one pack.

    Each part is run by itself, so that what overlaps or stays in a cache inside a whole layer does not show;
    ``layer`` is the whole.
    """
    (pack,) = forward.batches(inputs, len(z))
    hidden = engine.embed_pack(pack).expand(len(z), -1, -1).contiguous()  # type: ignore[arg-type]
    prefix = forward.project.keys_values(0, torch.from_numpy(z).to(engine.device))
    engine.packed_layer(0, hidden, pack, prefix)  # type: ignore[arg-type]
    layer, config = engine._packed[0], engine.backbone.config
    p, s, width = hidden.shape
    rows, spans = hidden.view(p * s, width), engine.spans(pack, p)  # type: ignore[arg-type]
    qkv = layer.qkv(rows).view(p, s, 3, config.n_heads, config.head_size)
    context = engine.attend(qkv, spans, prefix).reshape(p * s, width)
    mixed, inner = layer.attention_output(context), layer.intermediate(rows)
    norm = (*layer.attention_norm, config.layer_norm_eps)
    kernels = engine.kernels
    parts: dict[str, Callable[[], Any]] = {
        "keys and values of the prefix": lambda: forward.project.keys_values(
            0, torch.from_numpy(z).to(engine.device)
        ),
        "qkv": lambda: layer.qkv(rows),
        "attention": lambda: engine.attend(qkv, spans, prefix),
        "attention, text alone": lambda: kernels.text(qkv, spans),
        "attention, prefix alone": lambda: kernels.prefix(qkv[:, :, 0], *prefix),
        "attention output": lambda: layer.attention_output(context),
        "add and norm": lambda: engine.steps.add_norm(mixed, rows, *norm),
        "intermediate": lambda: layer.intermediate(rows),
        "activation": lambda: layer.activate(inner),
        "output": lambda: layer.output(inner),
        "layer": lambda: engine.packed_layer(0, hidden, pack, prefix),  # type: ignore[arg-type]
    }
    found = {}
    for name, part in parts.items():
        part()
        found[name] = round(1e3 * seconds(lambda part=part: [part() for _ in range(_RUNS)], 3) / _RUNS, 4)  # type: ignore[misc]
    return found


def kernel_table(work: Callable[[], object], *, on_gpu: bool) -> list[dict[str, Any]]:
    """Return the kernels (on a CPU: operators) that ``work`` ran, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        work()
    rows = []
    for event in profiled.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0 and (not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA):
            rows.append({"kernel": event.key[:120], "ms": round(spent / 1e3, 4), "calls": event.count})
    return sorted(rows, key=lambda row: -row["ms"])

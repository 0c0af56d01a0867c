from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import throughput_growth
from benchmarks.engine_work import PROMPT_TOKENS, Engine, necessary_flops, shaped_backbone


def test_necessary_flops_are_those_that_torch_counts_without_padding() -> None:
    backbone = shaped_backbone(2, 64, 2)
    prefix = torch.zeros(1, 2, PROMPT_TOKENS, 32)
    total = 0
    for t in (7, 12):
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            hidden = torch.zeros(1, t, 64)
            for layer in range(2):
                hidden = backbone.encoder.layer(layer, hidden, None, (prefix, prefix))
        total += counter.get_total_flops()
    assert necessary_flops(backbone.config, [7, 12], 2, shared_text=False) == total
    shared = sum(2 * t * 3 * 64 * 64 + 4 * t * t * 64 for t in (7, 12))
    assert necessary_flops(backbone.config, [7, 12], 2, shared_text=True) == total - shared


def test_growth_is_measured_in_pieces_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(throughput_growth, "BASE", {"examples": 1, "tokens": 8, "population": 2, "layers": 1})
    monkeypatch.setattr(throughput_growth, "CURVES", dict.fromkeys(throughput_growth.CURVES, (2,)))
    monkeypatch.setattr(throughput_growth, "save", lambda name, rows: tmp_path / name)
    monkeypatch.setattr(throughput_growth, "RESULTS", tmp_path)
    engines = [Engine.parse("torch:fp32"), Engine.parse("torch:int8")]
    points: list[dict[str, int]] = []
    point = throughput_growth.point

    def counted(size: dict[str, int], *arguments: Any) -> dict[str, Any]:
        points.append(size)
        if len(points) == 2:
            raise KeyboardInterrupt
        return point(size, *arguments)

    monkeypatch.setattr(throughput_growth, "point", counted)
    work = tmp_path / "work"
    assert throughput_growth.measure(engines, "cpu", tmp_path, "small", work, -1.0) is None
    assert not points
    with pytest.raises(KeyboardInterrupt):
        throughput_growth.measure(engines, "cpu", tmp_path, "small", work, 60.0)
    found = throughput_growth.measure(engines, "cpu", tmp_path, "small", work, 60.0)
    assert found is not None
    assert found[1].stat().st_size > 1000
    assert len(points) == 4 + 1  # the one that was cut off is done again, no other

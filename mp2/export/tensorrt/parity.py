"""Compare every stage of a low-precision runtime with torch in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from mp2.backbone import Backbone
from mp2.export.parity import Comparison

if TYPE_CHECKING:
    from mp2.engine.runtime import Runtime

# relative to the largest magnitude: one layer, and the logits after all of them. A few times what rounding
# every result to the type (2^-11, 2^-8, 2^-4) was measured to make of a layer of mini
STAGE_TOLERANCE = {"fp16": 4e-3, "bf16": 3e-2, "fp8": 0.12}
WHOLE_TOLERANCE = {"fp16": 2e-2, "bf16": 0.15, "fp8": 0.5}
_N, _T, _P, _M = 3, 13, 2, 5


@torch.inference_mode()
def compare_runtime(runtime: Runtime, backbone: Backbone) -> Iterator[Comparison]:
    """Yield a comparison with the float32 encoder for every stage of ``runtime``.

    Each layer gets the reference's own input; the last comparison is of the logits of the whole chain.
    """
    encoder, config = backbone.encoder, backbone.config
    rng = torch.Generator().manual_seed(20230811)
    t = min(_T, config.max_positions - _M)
    ids = torch.randint(0, config.vocab_size, (_N, t), generator=rng)
    mask = torch.arange(t)[None] < torch.tensor([t, t - 4, t - 7]).clamp(min=1)[:, None]
    keys, values = torch.randn(2, config.n_layers, _P, config.n_heads, _M, config.head_size, generator=rng)
    tolerance = STAGE_TOLERANCE[runtime.precision]

    def on(x: torch.Tensor) -> torch.Tensor:
        return x.to(runtime.device)

    def compare(
        name: str, got: torch.Tensor, expected: torch.Tensor, limit: float, real: torch.Tensor | None = None
    ) -> Comparison:
        got = got.float().cpu()
        if real is not None:
            got, expected = got[:, real], expected[:, real]
        difference = float((got - expected).abs().max())
        return Comparison(name, difference, difference / max(float(expected.abs().max()), 1e-12), limit)

    for n_inline in (0, _M):
        got = runtime.embed(on(ids), n_inline)
        yield compare(f"embed, {n_inline} inline rows", got, encoder.embed(ids, n_inline)[None], tolerance)
    rows = torch.randn(_P, _M, config.hidden, generator=rng)
    yield compare(
        "embed_inline", runtime.embed_inline(on(rows)), encoder.embed_inline(rows)[:, None], tolerance
    )
    text, chained = encoder.embed(ids)[None].expand(_P, -1, -1, -1), runtime.embed(on(ids))
    for i in range(config.n_layers):
        own = [(keys[i, c : c + 1], values[i, c : c + 1]) for c in range(_P)]
        prefix = (on(keys[i].unsqueeze(1)), on(values[i].unsqueeze(1)))
        after = torch.stack([encoder.layer(i, text[c], mask, own[c]) for c in range(_P)])
        one = torch.stack([encoder.layer(i, text[0], mask, own[c]) for c in range(_P)])
        same = torch.stack([encoder.layer(i, text[c], mask, own[0]) for c in range(_P)])
        none = encoder.layer(i, text[0], None, None)[None]
        name = f"layer_{i:02d}"
        got = runtime.layer(i, on(text[:1]), on(mask), prefix)
        yield compare(f"{name}, P prefixes, one text", got, one, tolerance, mask)
        got = runtime.layer(i, on(text), on(mask), (prefix[0][:1], prefix[1][:1]))
        yield compare(f"{name}, one prefix, P texts", got, same, tolerance, mask)
        yield compare(f"{name}, no prompt", runtime.layer(i, on(text[:1]), None, None), none, tolerance)
        chained = runtime.layer(i, chained, on(mask), prefix)
        text = after
    weight, bias = torch.randn(2, config.hidden, generator=rng), torch.randn(2, generator=rng)
    logits = text @ weight.T + bias
    got = runtime.head(on(text), on(weight), on(bias))
    yield compare("head", got, logits, tolerance)
    got = runtime.head(chained, on(weight), on(bias))
    yield compare("whole chain: logits", got, logits, WHOLE_TOLERANCE[runtime.precision], mask)

"""Compare what graphs compute with torch in float32: padded and not, with and without prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mp2.backbone import Backbone
from mp2.errors import Mp2Error
from mp2.export.emulated import emulated
from mp2.export.graphs import INLINE_GRAPH

if TYPE_CHECKING:
    from mp2.backbone.mlm_head import MlmHead
    from mp2.engine.backend import PopulationPrefix
    from mp2.engine.onnx.stages import GraphStages

# relative to the largest magnitude: one layer, and what comes out after all of them. Below float32, a few
# times what rounding every result to the type (2^-11, 2^-8, 2^-4) was measured to make of a layer of mini
STAGE_TOLERANCE = {"fp32": 2e-5, "fp16": 4e-3, "bf16": 3e-2, "fp8": 0.12}
WHOLE_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 0.15, "fp8": 0.5}
_N, _T, _P, _M = 3, 13, 2, 5  # examples, tokens, candidates, prompt rows; all different on purpose


@dataclass(frozen=True)
class Comparison:
    """One compared output; the relative difference is to the reference's largest magnitude."""

    name: str
    max_abs: float
    max_rel: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """True if the relative difference is a number within the tolerance."""
        return self.max_rel <= self.tolerance  # False for NaN

    def line(self) -> str:
        """Return the comparison as a line of the report."""
        verdict = "ok" if self.ok else "DIFFERS"
        return f"{self.name:<40} {self.max_abs:10.2e} {self.max_rel:10.2e} {self.tolerance:10.0e}  {verdict}"


REPORT_HEADER = f"{'output':<40} {'max abs':>10} {'max rel':>10} {'tolerance':>10}"


def check(comparisons: Iterable[Comparison], report: Callable[[Comparison], None], what: str) -> None:
    """``report`` every comparison as it is made; Mp2Error, with the words ``what``, if one differs."""
    seen = []
    for comparison in comparisons:
        seen.append(comparison)
        report(comparison)
    if bad := [c for c in seen if not c.ok]:
        raise Mp2Error(
            f"{len(bad)} of {len(seen)} outputs of {what} differ from torch, first '{bad[0].name}': "
            f"{bad[0].max_rel:.1e} relative, expected at most {bad[0].tolerance:.0e}"
        )


class _Probe:
    """Random but fixed inputs, small enough to be run through the full-size backbone in a moment."""

    def __init__(self, backbone: Backbone) -> None:
        self.encoder = backbone.encoder
        self.config = config = backbone.config
        rng = torch.Generator().manual_seed(20230811)
        t = min(_T, config.max_positions - _M)
        self.ids = torch.randint(0, config.vocab_size, (_N, t), generator=rng)
        self.mask = torch.arange(t)[None] < torch.tensor([t, t - 4, t - 7]).clamp(min=1)[:, None]
        shape = (2, config.n_layers, _P, config.n_heads, _M, config.head_size)
        self.keys, self.values = torch.randn(shape, generator=rng)
        self.rows = torch.randn(_P, _M, config.hidden, generator=rng)
        self.weight = torch.randn(_P, 2, config.hidden, generator=rng)
        self.bias = torch.randn(_P, 2, generator=rng)

    def layer(
        self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: PopulationPrefix | None
    ) -> torch.Tensor:
        """`ChainBackend.layer` by the encoder, a candidate at a time; prefix [P or 1, 1, h, m, d_h]."""
        rows = []
        for c in range(max(len(hidden), 1 if prefix is None else len(prefix[0]))):
            own = None if prefix is None else (prefix[0][c % len(prefix[0])], prefix[1][c % len(prefix[1])])
            rows.append(self.encoder.layer(index, hidden[c % len(hidden)], mask, own))
        return torch.stack(rows)

    def states(self, n: int, mask: torch.Tensor, which: int, m: int, inline: bool) -> torch.Tensor:
        """Text n's states before and after every layer, [L + 1, T, H], under ``m`` rows of a prompt."""
        rows = m if inline else 0
        hidden, seen = self.encoder.embed(self.ids[n : n + 1], rows), mask[n : n + 1]
        if rows:
            own = self.encoder.embed_inline(self.rows[which : which + 1, :m])
            hidden = torch.cat([hidden[:, :1], own, hidden[:, 1:]], 1)
            seen = torch.cat([seen[:, :1], torch.ones(1, m, dtype=torch.bool), seen[:, 1:]], 1)
        found = [hidden]
        for i in range(self.config.n_layers):
            prefix = None
            if m and not inline:
                prefix = (self.keys[i, which, None, :, :m], self.values[i, which, None, :, :m])
            found.append(self.encoder.layer(i, found[-1], seen, prefix))
        return torch.cat([torch.cat([x[:, :1], x[:, 1 + rows :]], 1) for x in found])


@torch.inference_mode()
def compare_stages(backend: GraphStages, backbone: Backbone) -> Iterator[Comparison]:
    """Yield a comparison with the encoder for every stage of ``backend`` and kind of input.

    Each layer gets the reference's own input; the last comparison is of the logits of the whole chain.
    """
    probe = _Probe(backbone)
    encoder, ids, mask = probe.encoder, probe.ids, probe.mask
    tolerance = STAGE_TOLERANCE[backend.precision]

    def on(x: torch.Tensor) -> torch.Tensor:
        return x.to(backend.device)

    for n_inline in (0, _M):
        got = backend.embed(on(ids), n_inline)[0]
        yield _compare(f"embed, {n_inline} inline rows", got, encoder.embed(ids, n_inline), tolerance)
    got = backend.embed_inline(on(probe.rows))[:, 0]
    yield _compare("embed_inline", got, encoder.embed_inline(probe.rows), tolerance)
    text, chained = encoder.embed(ids)[None], backend.embed(on(ids))
    for i in range(probe.config.n_layers):
        two = text if len(text) == _P else torch.cat([text, text.flip(1)])
        prefixes = (probe.keys[i].unsqueeze(1), probe.values[i].unsqueeze(1))
        one = (prefixes[0][:1], prefixes[1][:1])
        cases: Mapping[str, tuple[torch.Tensor, torch.Tensor | None, PopulationPrefix | None]] = {
            "no prompt": (two[:1], None, None),
            "no prompt, padded": (two, mask, None),
            "P prefixes, one text": (two[:1], None, prefixes),
            "P prefixes, one text, padded": (two[:1], mask, prefixes),
            "one prefix, P texts, padded": (two, mask, one),
        }
        for case, (hidden, real, prefix) in cases.items():
            fed = None if prefix is None else (on(prefix[0]), on(prefix[1]))
            got = backend.layer(i, on(hidden), None if real is None else on(real), fed)
            expected = probe.layer(i, hidden, real, prefix)
            yield _compare(f"layer_{i:02d}, {case}", got, expected, tolerance, real)
        chained = backend.layer(i, chained, on(mask), (on(prefixes[0]), on(prefixes[1])))
        text = probe.layer(i, text, mask, prefixes)
    weight, bias = probe.weight[0], probe.bias[0]
    logits = text @ weight.T + bias
    yield _compare("head", backend.head(on(text), on(weight), on(bias)), logits, tolerance)
    got = backend.head(chained, on(weight), on(bias))
    yield _compare("whole chain: logits", got, logits, WHOLE_TOLERANCE[backend.precision], mask)


RunGraph = Callable[[Mapping[str, torch.Tensor], Mapping[str, Sequence[int]]], Sequence[torch.Tensor]]
"""(feeds, output name -> shape) -> the outputs."""


def emulated_graph(path: Path) -> RunGraph:
    """Return what runs the graph at ``path`` on the CPU, rounding as its types do."""
    from mp2.engine.onnx.session import OnnxSession

    return OnnxSession(emulated(path).SerializeToString()).run


@torch.inference_mode()
def compare_whole(
    run: RunGraph, backbone: Backbone, precision: str, graph: str, mlm: MlmHead | None = None
) -> Iterator[Comparison]:
    """Yield comparisons of what ``run`` makes of a deployment ``graph``, `PREFIX_GRAPH` or `INLINE_GRAPH`.

    One prompt for all rows, and a batch that mixes: a prompt, a shorter one, none. ``mlm``: the head whose
    word probabilities the graph has.
    """
    probe, inline = _Probe(backbone), graph == INLINE_GRAPH
    width, limit = probe.config.hidden, WHOLE_TOLERANCE[precision]
    shape = (_N, probe.ids.shape[1])
    names = ("prompt_rows",) if inline else ("prompt_keys", "prompt_values")
    prompts = (probe.rows,) if inline else (probe.keys.transpose(0, 1), probe.values.transpose(0, 1))
    cases = {  # the prompt that each row has and how many rows of it
        "": ([0], [_M], torch.ones_like(probe.mask)),
        ", padded": ([1], [_M], probe.mask),
        ", a prompt a row": ([0, 1, 1], [_M, _M - 2, 0], probe.mask),
    }
    for case, (pick, length, mask) in cases.items():
        feeds = {
            "input_ids": probe.ids,
            "attention_mask": mask.long(),
            "prompt_length": torch.tensor(length),
            "span_weight": probe.weight[pick],
            "span_bias": probe.bias[pick],
            **{name: x[pick] for name, x in zip(names, prompts, strict=True)},
        }
        segments = torch.stack([torch.tensor([[1, 3], [2, n - 1], [2, 1]]) for n in mask.sum(1).tolist()])
        feeds["segments"] = segments  # [N, 3, 2]; the last has no token
        pooled = (_N, 3, probe.config.n_layers + 1, width)
        outputs = {"start_logits": shape, "end_logits": shape, "hidden": (*shape, width), "pooled": pooled}
        if mlm is not None:
            outputs["word_log_probs"] = (_N, 3, probe.config.vocab_size)
        got = dict(zip(outputs, run(feeds, outputs), strict=True))
        rows = [
            probe.states(n, mask, pick[n % len(pick)], length[n % len(length)], inline) for n in range(_N)
        ]
        states = torch.stack(rows)  # [N, L + 1, T, H]
        logits = torch.einsum("nth,nch->ntc", states[:, -1], probe.weight[pick].expand(_N, -1, -1))
        logits = logits + probe.bias[pick].expand(_N, -1)[:, None]
        expected = {
            "start_logits": logits[..., 0],
            "end_logits": logits[..., 1],
            "hidden": states[:, -1],
            "pooled": torch.stack(
                [
                    torch.stack([x[:, a : b + 1].sum(1) / max(b + 1 - a, 1) for a, b in spans])
                    for x, spans in zip(states, segments.tolist(), strict=True)
                ]
            ),
        }
        if mlm is not None:
            logits = mlm.logits(expected["pooled"][:, :, -1])
            expected["word_log_probs"] = torch.log_softmax(logits, -1)
        for name, wanted in expected.items():
            seen = slice(None) if name in ("pooled", "word_log_probs") else mask
            yield _compare(f"{graph}{case}: {name}", got[name].cpu()[seen], wanted[seen], limit)


def _compare(
    name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float, mask: torch.Tensor | None = None
) -> Comparison:
    """Compare over real tokens, ``mask`` [N, T] of [P, N, T, ...]: what stands on padding is never read."""
    got = got.float().cpu()
    if mask is not None:
        got, expected = got[:, mask], expected[:, mask]
    difference = float((got - expected).abs().max())
    return Comparison(name, difference, difference / max(float(expected.abs().max()), 1e-12), tolerance)

"""Compare every output of an engine folder with torch, padded and unpadded, with and without prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mp2.backbone import Backbone
from mp2.engine.folder import layer_file
from mp2.engine.onnx.session import OnnxSession

STAGE_TOLERANCE = 2e-5
WHOLE_TOLERANCE = 1e-4
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


@torch.inference_mode()
def compare_folder(
    folder: Path, backbone: Backbone, head: tuple[torch.Tensor, torch.Tensor] | None
) -> Iterator[Comparison]:
    """Yield a comparison for every graph of ``folder`` and kind of input; one session is open at a time.

    ``head`` is the span head baked into the deployment graphs, None where they take it as inputs.
    """
    probe = _Probe(backbone)
    yield from _compare_embeddings(folder, probe)
    yield from _compare_layers(folder, probe)
    yield from _compare_heads(folder, probe, head)


class _Probe:
    """Random but fixed inputs, small enough to be run through the full-size backbone in a moment."""

    def __init__(self, backbone: Backbone) -> None:
        self.config = backbone.config
        self.encoder = backbone.encoder
        rng = torch.Generator().manual_seed(20230811)
        config = self.config
        self.t = min(_T, config.max_positions - _M)
        self.ids = torch.randint(0, config.vocab_size, (_N, self.t), generator=rng)
        lengths = torch.tensor([self.t, self.t - 4, self.t - 7]).clamp(min=1)
        self.mask = torch.arange(self.t)[None, :] < lengths[:, None]
        self.all = torch.ones(_N, self.t, dtype=torch.bool)
        shape = (config.n_layers, _P, config.n_heads, _M, config.head_size)
        self.keys = torch.randn(shape, generator=rng)
        self.values = torch.randn(shape, generator=rng)
        self.prompts = torch.randn(_P, _M, config.hidden, generator=rng)
        self.span = (torch.randn(2, config.hidden, generator=rng), torch.randn(2, generator=rng))

    def chain(self, mask: torch.Tensor, candidate: int | None) -> torch.Tensor:
        """The reference's last hidden states [N, T, H] under one candidate's prefixes (None: no prompt)."""
        hidden = self.encoder.embed(self.ids)
        for i in range(self.config.n_layers):
            prefix = None
            if candidate is not None:
                one = slice(candidate, candidate + 1)
                prefix = (self.keys[i, one], self.values[i, one])
            hidden = self.encoder.layer(i, hidden, mask, prefix)
        return hidden

    def chain_inline(self, mask: torch.Tensor, candidate: int) -> torch.Tensor:
        """The same with the candidate's prompt rows in the sequence, left out at the end."""
        text = self.encoder.embed(self.ids, _M)
        rows = self.encoder.embed_inline(self.prompts[candidate : candidate + 1]).expand(_N, -1, -1)
        hidden = torch.cat([text[:, :1], rows, text[:, 1:]], 1)
        seen = torch.cat([mask[:, :1], torch.ones(_N, _M, dtype=torch.bool), mask[:, 1:]], 1)
        for i in range(self.config.n_layers):
            hidden = self.encoder.layer(i, hidden, seen, None)
        return torch.cat([hidden[:, :1], hidden[:, 1 + _M :]], 1)


def _compare_embeddings(folder: Path, probe: _Probe) -> Iterator[Comparison]:
    width = probe.config.hidden
    session = OnnxSession(folder / "embed.onnx")
    for n_inline in (0, _M):
        feeds = {"input_ids": probe.ids, "n_inline": torch.tensor(n_inline)}
        (got,) = session.run(feeds, {"hidden_out": (1, _N, probe.t, width)})
        expected = probe.encoder.embed(probe.ids, n_inline)
        yield _compare(f"embed, {n_inline} inline rows", got[0], expected, STAGE_TOLERANCE)
    session = OnnxSession(folder / "embed_inline.onnx")
    (got,) = session.run({"prompts": probe.prompts}, {"hidden_out": (_P, 1, _M, width)})
    yield _compare("embed_inline", got[:, 0], probe.encoder.embed_inline(probe.prompts), STAGE_TOLERANCE)


def _compare_layers(folder: Path, probe: _Probe) -> Iterator[Comparison]:
    config = probe.config
    text = probe.encoder.embed(probe.ids)
    for i in range(config.n_layers):
        session = OnnxSession(folder / layer_file(i, "onnx"))
        keys, values = probe.keys[i], probe.values[i]  # [P, h, m, d_h]

        def reference(
            hidden: torch.Tensor,  # [P or 1, N, T, H]
            mask: torch.Tensor,
            prefix: tuple[torch.Tensor, torch.Tensor] | None,  # [P or 1, h, m, d_h]
            layer: int = i,
        ) -> torch.Tensor:
            p = max(hidden.shape[0], 1 if prefix is None else prefix[0].shape[0])
            rows = []
            for c in range(p):
                one = None
                if prefix is not None:
                    one = (prefix[0][c % len(prefix[0])][None], prefix[1][c % len(prefix[1])][None])
                rows.append(probe.encoder.layer(layer, hidden[c % len(hidden)], mask, one))
            return torch.stack(rows)

        two = torch.stack([text, text.flip(0)])
        nothing = torch.empty(1, config.n_heads, 0, config.head_size)
        cases: Mapping[str, tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]] = {
            "no prompt": (text[None], probe.all, None),
            "no prompt, padded": (two, probe.mask, None),
            "P prefixes, one text": (text[None], probe.all, (keys, values)),
            "P prefixes, one text, padded": (text[None], probe.mask, (keys, values)),
            "one prefix, P texts, padded": (two, probe.mask, (keys[:1], values[:1])),
        }
        name = layer_file(i, "onnx").removesuffix(".onnx")
        for case, (hidden, mask, prefix) in cases.items():
            expected = reference(hidden, mask, prefix)
            fed = (nothing, nothing) if prefix is None else prefix
            feeds = {
                "hidden": hidden,
                "mask": mask,
                "prefix_keys": fed[0].unsqueeze(1),
                "prefix_values": fed[1].unsqueeze(1),
            }
            (got,) = session.run(feeds, {"hidden_out": expected.shape})
            yield _compare(f"{name}, {case}", got, expected, STAGE_TOLERANCE, mask)
        text = probe.encoder.layer(i, text, probe.all, (keys[:1], values[:1]))


def _compare_heads(
    folder: Path, probe: _Probe, head: tuple[torch.Tensor, torch.Tensor] | None
) -> Iterator[Comparison]:
    span = probe.span if head is None else head
    named = {"span_weight": span[0], "span_bias": span[1]}
    outside = named if head is None else {}
    plain = probe.chain(probe.all, None)
    (got,) = OnnxSession(folder / "head.onnx").run(
        {"hidden": plain[None], **named}, {"logits": (1, _N, probe.t, 2)}
    )
    yield _compare("head", got[0], plain @ span[0].T + span[1], STAGE_TOLERANCE)

    def whole(
        session: OnnxSession,
        name: str,
        prompts: Mapping[str, torch.Tensor],
        mask: torch.Tensor,
        expected: Callable[[], torch.Tensor],
    ) -> Iterator[Comparison]:
        feeds = {"input_ids": probe.ids, "attention_mask": mask.long(), **prompts, **outside}
        shape = (_N, probe.t)
        got = session.run(feeds, {"start_logits": shape, "end_logits": shape})
        logits = expected() @ span[0].T + span[1]
        for k, output in enumerate(("start_logits", "end_logits")):
            yield _compare(f"{name}: {output}", got[k], logits[..., k], WHOLE_TOLERANCE, mask)

    session = OnnxSession(folder / "backbone.onnx")
    one = {"prompt_keys": probe.keys[:, :1], "prompt_values": probe.values[:, :1]}
    none = {name: x[:, :, :, :0] for name, x in one.items()}
    pick = [0, 1, 0]  # a prompt for each row
    each = {"prompt_keys": probe.keys[:, pick], "prompt_values": probe.values[:, pick]}

    def mixed() -> torch.Tensor:
        both = [probe.chain(probe.mask, c) for c in range(_P)]
        return torch.stack([both[c][n] for n, c in enumerate(pick)])

    yield from whole(session, "backbone", one, probe.all, lambda: probe.chain(probe.all, 0))
    yield from whole(session, "backbone, padded", one, probe.mask, lambda: probe.chain(probe.mask, 0))
    yield from whole(session, "backbone, no prompt", none, probe.mask, lambda: probe.chain(probe.mask, None))
    yield from whole(session, "backbone, a prompt a row", each, probe.mask, mixed)
    session = OnnxSession(folder / "backbone_inline.onnx")
    rows = {"prompts": probe.prompts[:1]}
    for case, mask in (("", probe.all), (", padded", probe.mask)):
        expected = probe.chain_inline(mask, 0)
        yield from whole(session, f"backbone_inline{case}", rows, mask, lambda e=expected: e)  # type: ignore[misc]


def _compare(
    name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float, mask: torch.Tensor | None = None
) -> Comparison:
    """Compare over real tokens: what stands at padding is never read."""
    if mask is not None:
        where = mask if expected.dim() == 2 else mask.unsqueeze(-1)
        got, expected = (torch.where(where, x, torch.zeros(())) for x in (got, expected))
    difference = float((got - expected).abs().max())
    return Comparison(name, difference, difference / max(float(expected.abs().max()), 1e-12), tolerance)


def failed(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return those out of tolerance."""
    return [c for c in comparisons if not c.ok]

"""Precisions "bf16" and "int8" of the CPU: candidates as differences from a reference that is in float32.

A population's candidates differ little from each other, so what rounding costs should be a share of that
little. Candidate 0 of every call is the reference (the population's mean) and runs in float32. Before each
matrix product the other candidates' rows are written as reference + difference; linear layers act on the two
separately, the reference's product is there already, and only the differences are rounded and multiplied by
rounded weights: to bfloat16 (about eight times the float32 rate with AMX), or, row by row, to int8 (VNNI,
AMX). What is not linear (softmax, GELU, LayerNorm) sees float32 sums. With AMX, attention is made of
differences, too, and a narrow layer is three calls of C (`mp2.engine.cpu.tiles`). The error of a loss is thus
a small share (1/500, 1/100) of its *difference* from the reference's loss, where rounding the activations
themselves would cost that share of everything; rank order survives, and a population without spread has no
error at all. One candidate alone runs in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mp2.backbone import Backbone, BackboneConfig
from mp2.backbone.encoder import activate
from mp2.engine.backend import PopulationPrefix
from mp2.engine.chain import Candidates
from mp2.engine.cpu.attention import attend, attend_shared_text
from mp2.engine.cpu.backend import CpuBackend, PreparedLayer
from mp2.engine.cpu.difference_steps import (
    Difference,
    DifferenceLinear,
    bf16_unfit,
    int8_unfit,
    make_linear,
    make_steps,
)
from mp2.engine.cpu.native.interface import MAX_ROW
from mp2.engine.cpu.tiles import Reference, TileLayer, make_attention, make_layer
from mp2.errors import UsageError


@dataclass(frozen=True)
class _RoughLayer:
    tiles: TileLayer | None  # all of it in C
    qkv: DifferenceLinear
    attention_output: DifferenceLinear
    intermediate: DifferenceLinear
    output: DifferenceLinear


class _WithReference(Candidates):
    """P candidates behind the reference they are computed against: the mean of the finite ones."""

    def __init__(self, z: torch.Tensor) -> None:
        finite = z[torch.isfinite(z).flatten(1).all(1)]
        reference = finite.mean(0) if len(finite) else torch.zeros_like(z[0])
        super().__init__(torch.cat([reference.unsqueeze(0), z]))

    def part(self, x: torch.Tensor, candidates: slice) -> torch.Tensor:
        """See `Candidates.part`; with the reference before them."""
        return torch.cat([x[:1], x[1:][candidates]])

    def own(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Candidates.own`."""
        return hidden[1:]


class DifferenceBackend(CpuBackend):
    """The stages on torch's CPU, for populations: candidate 0 of [1 + P, N, T, H] is the reference."""

    def __init__(self, backbone: Backbone, *, precision: str, reason: str = "") -> None:
        """Prepare for the CPU and ``precision``, bf16 or int8; layers are rounded when they are first used.

        Raises UsageError for int8 on a processor whose int8 products are not exact, and for rows too long.
        """
        super().__init__(backbone, reason=reason)
        if precision == "int8" and (unfit := int8_unfit()):
            raise UsageError(f"precision int8: {unfit}; use --precision fp32")
        if precision == "bf16" and (unfit := bf16_unfit()):
            self.reason += f"; {unfit}"
        if backbone.config.ffn > MAX_ROW:
            raise UsageError(
                f"feed-forward of {backbone.config.ffn}, precision {precision} takes at most {MAX_ROW}"
            )
        self.precision = precision
        self._rough_layers: dict[int, _RoughLayer] = {}
        self.steps = make_steps(precision)
        tiles = precision == "bf16" and tiles_fit(backbone.config)
        self._tile_attention = make_attention(backbone.config) if tiles else None

    def candidates(self, z: torch.Tensor) -> Candidates:
        """See `ChainBackend.candidates`; a single candidate needs no reference: it runs in float32."""
        return Candidates(z) if len(z) == 1 else _WithReference(z)

    def usual_tokens(self) -> int:
        """See `ChainBackend.usual_tokens`.

        More of the calls are short, and the reference, which is in float32, should be a small share.
        """
        return 2 * super().usual_tokens()

    @torch.inference_mode()
    def layer(
        self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: PopulationPrefix | None
    ) -> torch.Tensor:
        """See `ChainBackend.layer`; with more than one candidate, the first is the reference."""
        n_blocks = max(len(hidden), 1 if prefix is None else len(prefix[0]))
        if n_blocks == 1:
            return super().layer(index, hidden, mask, prefix)
        exact, rough = self._layers.get(index) or self._prepare(index), self._rough(index)
        _, n, t, width = hidden.shape
        x = hidden.reshape(-1, n * t, width)
        context, moved = self._attended(x, (n, t), exact, rough, mask, prefix)
        out = self._second_half(x, context.reshape(n * t, width), moved, exact, rough)
        return out.view(-1, n, t, width)

    def _attended(
        self,
        x: torch.Tensor,
        texts: tuple[int, int],
        exact: PreparedLayer,
        rough: _RoughLayer,
        mask: torch.Tensor | None,
        prefix: PopulationPrefix | None,
    ) -> tuple[torch.Tensor, Difference]:
        """Return contexts for the input ``x`` [1 + P or 1, R, H] of N ``texts`` of T tokens.

        Those of the reference [N, T, h, d_h], and the candidates' differences from them.
        """
        heads = (*texts, 3, *self._heads)
        qkv = exact.qkv(x[0]).view(heads)
        tiles = self._tile_attention
        if len(x) == 1:
            assert prefix is not None
            if tiles is not None:
                return _in_rows(*tiles.shared_text(qkv, mask, prefix))
            context = attend_shared_text(qkv, mask, prefix)
        elif tiles is not None:
            if rough.tiles is not None:
                moved = rough.tiles.qkv(x)
            else:
                moved = rough.qkv(self.steps.difference(x)).y
            return _in_rows(*tiles(qkv, moved.view(-1, *heads), mask, prefix))
        else:
            blocks = torch.empty(len(x), x.shape[1], 3 * x.shape[2])
            blocks[0] = qkv.view(blocks[0].shape)
            self.steps.add(rough.qkv(self.steps.difference(x)), blocks)
            context = attend(blocks.view(-1, *heads), mask, prefix)
        return context[0], self.steps.difference(context.reshape(len(context), *x.shape[1:]))

    def _second_half(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        moved: Difference,
        exact: PreparedLayer,
        rough: _RoughLayer,
    ) -> torch.Tensor:
        """Return the layer's output [1 + P, R, H] from its input and the contexts of `_attended`."""
        config, steps = self._config, self.steps
        n_rows, width = context.shape
        out = torch.empty(1 + len(moved.q) // n_rows, n_rows, width)
        attended = exact.attention_output(context)
        normed = self._norm(attended + x[0], exact.attention_norm)
        raised = exact.intermediate(normed)
        active = activate(config.activation, raised)
        lowered = exact.output(active)
        out[0] = self._norm(lowered + normed, exact.output_norm)
        if rough.tiles is not None:
            rough.tiles.second_half(moved.q, x, Reference(attended, normed, raised, lowered), out)
            return out
        inner = torch.empty_like(out)
        inner[0] = normed
        eps = config.layer_norm_eps
        product = rough.attention_output(moved)
        difference = steps.add_norm(product, attended, x, exact.attention_norm, eps, inner, difference=True)
        assert difference is not None
        difference = steps.add_activate(rough.intermediate(difference), raised, active, config.activation)
        product = rough.output(difference)
        steps.add_norm(product, lowered, inner, exact.output_norm, eps, out, difference=False)
        return out

    def _rough(self, index: int) -> _RoughLayer:
        if index not in self._rough_layers:
            source = self._encoder.body(index)
            parts = [source.query.weight, source.key.weight, source.value.weight]
            self._rough_layers[index] = _RoughLayer(
                tiles=None if self._tile_attention is None else make_layer(source, self._config),
                qkv=self._linear(torch.cat(parts)),
                attention_output=self._linear(source.attention_output.weight),
                intermediate=self._linear(source.intermediate.weight),
                output=self._linear(source.output.weight),
            )
        return self._rough_layers[index]

    def _linear(self, weight: torch.Tensor) -> DifferenceLinear:
        return make_linear(self.precision, weight.detach().float())


def tiles_fit(config: BackboneConfig) -> bool:
    """Tell whether bf16 differences of this backbone would be computed in AMX's tiles here."""
    return not bf16_unfit() and make_attention(config) is not None


def _in_rows(context: torch.Tensor, moved: torch.Tensor) -> tuple[torch.Tensor, Difference]:
    return context, Difference(moved, torch.ones(len(moved)))

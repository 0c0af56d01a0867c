"""Precision "int8": candidates computed as int8 differences from a reference that is computed in float32.

A population's candidates differ little from each other, so what rounding costs should be a share of that
little. Candidate 0 of every call is the reference (the population's mean) and runs in float32. Before each
matrix product the other candidates' rows are written as reference + difference; linear layers act on the two
separately, the reference's product is there already, and only the differences, scaled row by row, are
rounded to int8 and multiplied by int8 weights (VNNI, AMX: about four times the float32 rate). What is not
linear (softmax, GELU, LayerNorm) sees float32 sums. The error of a loss is thus about 1% of its *difference*
from the reference's loss, where rounding the activations themselves would cost 1% of everything; rank order
survives, and a population without spread has no error at all. One candidate alone runs in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mp2.backbone import Backbone
from mp2.backbone.encoder import activate
from mp2.engine.backend import Prefixes
from mp2.engine.chain import Candidates
from mp2.engine.cpu.attention import attend, attend_shared_text
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cpu.int8_steps import Int8Linear, int8_problem, make_steps
from mp2.engine.cpu.native.interface import MAX_ROW
from mp2.errors import UsageError


@dataclass(frozen=True)
class _Int8Layer:
    qkv: Int8Linear
    attention_output: Int8Linear
    intermediate: Int8Linear
    output: Int8Linear


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


class Int8Backend(CpuBackend):
    """The stages on torch's CPU, for populations: candidate 0 of [1 + P, N, T, H] is the reference."""

    def __init__(self, backbone: Backbone, *, reason: str = "") -> None:
        """Prepare for the CPU; layers are rounded when they are first used."""
        super().__init__(backbone, precision="fp32", reason=reason)
        if problem := int8_problem():
            raise UsageError(f"precision int8: {problem}; use --precision fp32")
        if backbone.config.ffn > MAX_ROW:
            raise UsageError(f"feed-forward of {backbone.config.ffn}, precision int8 takes at most {MAX_ROW}")
        self.precision = "int8"
        self._int8_layers: dict[int, _Int8Layer] = {}
        self.steps = make_steps()

    def candidates(self, z: torch.Tensor) -> Candidates:
        """See `ChainBackend.candidates`; a single candidate needs no reference: it runs in float32."""
        return Candidates(z) if len(z) == 1 else _WithReference(z)

    def usual_tokens(self) -> int:
        """See `ChainBackend.usual_tokens`.

        More of int8's calls are short, and its reference, which is not int8, should be a small share.
        """
        return 2 * super().usual_tokens()

    @torch.inference_mode()
    def layer(
        self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: Prefixes | None
    ) -> torch.Tensor:
        """See `ChainBackend.layer`; with more than one candidate, the first is the reference."""
        n_blocks = max(len(hidden), 1 if prefix is None else len(prefix[0]))
        if n_blocks == 1:
            return super().layer(index, hidden, mask, prefix)
        config, steps = self._config, self.steps
        exact, rough = self._layers.get(index) or self._prepare(index), self._rough(index)
        _, n, t, width = hidden.shape
        rows, heads = n * t, (n, t, 3, *self._heads)
        x = hidden.reshape(-1, rows, width)

        if len(x) == 1:
            assert prefix is not None
            context = attend_shared_text(exact.qkv(x[0]).view(heads), mask, prefix)
        else:
            qkv = torch.empty(n_blocks, rows, 3 * width)
            qkv[0] = exact.qkv(x[0])
            steps.add(rough.qkv(steps.difference(x)), qkv)
            context = attend(qkv.view(n_blocks, *heads), mask, prefix)
        context = context.reshape(n_blocks, rows, width)

        product = exact.attention_output(context[0])
        normed = torch.empty(n_blocks, rows, width)
        normed[0] = self._norm(product + x[0], exact.attention_norm)
        difference = steps.add_norm(
            rough.attention_output(steps.difference(context)),
            product,
            x,
            exact.attention_norm,
            config.layer_norm_eps,
            normed,
            difference=True,
        )
        assert difference is not None

        product = exact.intermediate(normed[0])
        active = activate(config.activation, product)
        difference = steps.add_activate(rough.intermediate(difference), product, active, config.activation)
        product = exact.output(active)
        out = torch.empty(n_blocks, rows, width)
        out[0] = self._norm(product + normed[0], exact.output_norm)
        steps.add_norm(
            rough.output(difference),
            product,
            normed,
            exact.output_norm,
            config.layer_norm_eps,
            out,
            difference=False,
        )
        return out.view(n_blocks, n, t, width)

    def _rough(self, index: int) -> _Int8Layer:
        if index not in self._int8_layers:
            source = self._encoder.body(index)
            parts = [source.query.weight, source.key.weight, source.value.weight]
            self._int8_layers[index] = _Int8Layer(
                qkv=Int8Linear(torch.cat(parts).detach().float()),
                attention_output=Int8Linear(source.attention_output.weight.detach().float()),
                intermediate=Int8Linear(source.intermediate.weight.detach().float()),
                output=Int8Linear(source.output.weight.detach().float()),
            )
        return self._int8_layers[index]

"""Differences from a reference in a small type, their matrix products, and what lies between those.

Shapes as in ``native/differences.c``: blocks [1 + P, R, K] of a reference's rows and P candidates' rows; a
`Difference` holds the candidates' differences from the reference, a `Product` is what comes out of it times
weights. Types: int8 with a scale a row (VNNI, AMX), bfloat16 (AMX; AVX-512 with bf16). The passes between
products are in C where that compiles, else in torch.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from mp2.backbone.encoder import activate
from mp2.engine.cpu import native
from mp2.engine.cpu.native.interface import ACTIVATIONS, SPARE_ROWS

_TYPES = {"bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Difference:
    """Candidates' rows minus the reference's: about ``q * scale``, with at most half a step of error."""

    q: torch.Tensor  # [P * R, K] int8 or bfloat16
    scale: torch.Tensor  # [P * R] float32; 1 for bfloat16


@dataclass(frozen=True)
class Product:
    """A difference times weights: ``y * scale * channel`` is what it adds to the reference's product."""

    y: torch.Tensor  # [P * R, N] int32 or bfloat16
    scale: torch.Tensor  # [P * R]
    channel: torch.Tensor  # [N], the weights' scale of each output channel; 1 for bfloat16

    def dense(self, n_rows: int) -> torch.Tensor:
        """Return it in float32, [P, R, N] for R = ``n_rows``."""
        scaled = self.y.float().mul_(self.channel).mul_(self.scale.unsqueeze(1))
        return scaled.view(-1, n_rows, self.y.shape[1])


class DifferenceLinear(Protocol):
    """The weights of a linear layer for differences; its bias is in the reference's product."""

    def __call__(self, difference: Difference) -> Product:
        """Multiply."""
        ...


class Int8Linear:
    """`DifferenceLinear` in int8."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Round ``weight`` [out, in] to int8 with one scale an output channel."""
        channel = weight.abs().amax(1).clamp_min(1e-30) / 127
        self._channel = channel.contiguous()
        self._q = (weight / channel.unsqueeze(1)).round().to(torch.int8).t().contiguous()

    def __call__(self, difference: Difference) -> Product:
        """See `DifferenceLinear`."""
        return Product(torch._int_mm(difference.q, self._q), difference.scale, self._channel)


class Bf16Linear:
    """`DifferenceLinear` in bfloat16."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Round ``weight`` [out, in] to bfloat16."""
        self._weight = weight.to(torch.bfloat16).contiguous()
        self._channel = torch.ones(len(weight))

    def __call__(self, difference: Difference) -> Product:
        """See `DifferenceLinear`."""
        return Product(F.linear(difference.q, self._weight), difference.scale, self._channel)


def make_linear(precision: str, weight: torch.Tensor) -> DifferenceLinear:
    """Return the weights [out, in] of a linear layer, rounded for differences in ``precision``."""
    return Int8Linear(weight) if precision == "int8" else Bf16Linear(weight)


def bf16_unfit() -> str:
    """Tell in a line why bfloat16 products do not pay on this processor; "" where they do."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported():
        return ""
    return "this processor has no bfloat16 products (AMX, or AVX-512 with bf16), fp32 is faster here"


@functools.cache
def int8_unfit() -> str:
    """Tell in a line why int8 matrix products cannot be had on this processor; "" where they are exact.

    ``torch._int_mm`` has no public name, and on an x86 processor without VNNI or AMX it returns wrong sums
    without a word: its kernels there add pairs of unsigned times signed products in 16 bits, which saturate
    beyond 32,767. 2 x 127 x 127 is enough to reach that once a factor is shifted to be unsigned, so rows of
    127 in all signs, in shapes with and without full tiles, tell such a kernel from an exact one.
    """
    for rows, inner, columns in ((5, 8, 3), (16, 64, 16), (61, 320, 48)):
        row = torch.full((rows, inner), 127, dtype=torch.int8)
        column = torch.full((inner, columns), 127, dtype=torch.int8)
        for a, b in ((row, column), (row, -column), (-row, column), (-row - 1, column)):
            try:
                exact = torch.equal(torch._int_mm(a, b), a.int() @ b.int())
            except (RuntimeError, AttributeError, TypeError):
                return "this torch has no int8 matrix product for this processor"
            if not exact:
                return "int8 products saturate on this processor (no VNNI or AMX) and losses would be wrong"
    return ""


class TorchSteps:
    """The steps in plain torch: anywhere, and the reference of `NativeSteps`."""

    name = "torch"

    def __init__(self, precision: str) -> None:
        """Round differences to ``precision``: bf16 or int8."""
        self._precision = precision

    def difference(self, x: torch.Tensor) -> Difference:
        """Return block ``x`` [1 + P, R, K] relative to its reference."""
        return self._round((x[1:] - x[0]).view(-1, x.shape[2]))

    def add(self, product: Product, out: torch.Tensor) -> None:
        """Fill the candidates' rows of ``out`` [1 + P, R, N] from the reference's, which are there."""
        torch.add(out[0], product.dense(out.shape[1]), out=out[1:])

    def add_norm(
        self,
        product: Product,
        reference: torch.Tensor,
        residual: torch.Tensor,
        norm: tuple[torch.Tensor, torch.Tensor],
        eps: float,
        out: torch.Tensor,
        *,
        difference: bool,
    ) -> Difference | None:
        """LayerNorm(``reference`` [R, N] + product + ``residual`` [1 + P or 1, R, N]) into ``out``.

        The reference's rows of ``out`` [1 + P, R, N] are there. With ``difference``, also returns out's.
        """
        total = product.dense(out.shape[1]).add_(reference)
        total += residual if len(residual) == 1 else residual[1:]
        out[1:] = torch.nn.functional.layer_norm(total, (out.shape[2],), *norm, eps)
        return self.difference(out) if difference else None

    def add_activate(
        self, product: Product, reference: torch.Tensor, active: torch.Tensor, activation: str
    ) -> Difference:
        """Return activation(``reference`` [R, N] + product) relative to ``active``, the reference's."""
        total = activate(activation, product.dense(len(reference)).add_(reference))
        return self._round(total.sub_(active).view(-1, active.shape[1]))

    def _round(self, rows: torch.Tensor) -> Difference:
        if self._precision == "bf16":
            return Difference(rows.to(torch.bfloat16), torch.ones(len(rows)))
        top = rows.abs().amax(1)
        q = rows.mul_((127 / top.clamp_min(1e-30)).unsqueeze(1)).round_()
        return Difference(q.to(torch.int8), top / 127)


class NativeSteps(TorchSteps):
    """The steps in C: each reads and writes a row once."""

    name = "C"

    def __init__(self, precision: str, library: ctypes.CDLL) -> None:
        """Call ``library``, made from ``native/differences.c``."""
        super().__init__(precision)
        self._library = library

    def difference(self, x: torch.Tensor) -> Difference:
        """See `TorchSteps.difference`."""
        p, r, k = len(x) - 1, x.shape[1], x.shape[2]
        made = self._empty(p * r, k)
        self._call("difference", x, made.q, made.scale, p, r, k)
        return made

    def add(self, product: Product, out: torch.Tensor) -> None:
        """See `TorchSteps.add`."""
        self._call("add", *_parts(product), out, len(out) - 1, *out.shape[1:])

    def add_norm(
        self,
        product: Product,
        reference: torch.Tensor,
        residual: torch.Tensor,
        norm: tuple[torch.Tensor, torch.Tensor],
        eps: float,
        out: torch.Tensor,
        *,
        difference: bool,
    ) -> Difference | None:
        """See `TorchSteps.add_norm`."""
        p, r, n = len(out) - 1, out.shape[1], out.shape[2]
        made = self._empty(p * r, n) if difference else None
        q, scale = (None, None) if made is None else (made.q, made.scale)
        shared = len(residual) == 1
        self._call(
            "add_norm",
            *(*_parts(product), reference, residual, shared, *norm, eps, out, q, scale),
            *(p, r, n),
        )
        return made

    def add_activate(
        self, product: Product, reference: torch.Tensor, active: torch.Tensor, activation: str
    ) -> Difference:
        """See `TorchSteps.add_activate`."""
        r, n = active.shape
        made = self._empty(len(product.y), n)
        kind = ACTIVATIONS[activation]
        self._call(
            "add_activate",
            *(*_parts(product), reference, active, kind, made.q, made.scale, len(product.y) // r, r, n),
        )
        return made

    def _call(self, name: str, *arguments: torch.Tensor | float | None) -> None:
        addresses: list[float | None] = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                assert argument.is_contiguous()
                addresses.append(argument.data_ptr())
            else:
                addresses.append(argument)
        getattr(self._library, f"mp2_{self._precision}_{name}")(*addresses, torch.get_num_threads())

    def _empty(self, rows: int, width: int) -> Difference:
        q = torch.empty(rows + SPARE_ROWS, width, dtype=_TYPES[self._precision])
        return Difference(q[:rows], torch.empty(rows))


def _parts(product: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return product.y, product.scale, product.channel


def make_steps(precision: str) -> TorchSteps:
    """Return the C steps for ``precision`` if they can be had, else torch's."""
    library = native.load()
    return TorchSteps(precision) if library is None else NativeSteps(precision, library)

"""What precision "int8" does between its matrix products: in C where it compiles, else in torch.

Shapes as in ``native/int8.c``: blocks [1 + P, R, K] of a reference's rows and P candidates' rows; ``q`` int8
[P * R, K] with ``scale`` [P * R] holds the candidates' differences from the reference; a `Product` is what
comes out of q times int8 weights.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from mp2.backbone.encoder import activate
from mp2.engine.cpu import native
from mp2.engine.cpu.native.interface import ACTIVATIONS


@dataclass(frozen=True)
class Difference:
    """Candidates' rows minus the reference's: about ``q * scale``, with at most half a step of error."""

    q: torch.Tensor  # [P * R, K] int8
    scale: torch.Tensor  # [P * R] float32


@dataclass(frozen=True)
class Product:
    """A difference times int8 weights: ``y * scale * channel`` is what it adds to the reference's product."""

    y: torch.Tensor  # [P * R, N] int32
    scale: torch.Tensor  # [P * R]
    channel: torch.Tensor  # [N], the weights' scale of each output channel

    def dense(self, n_rows: int) -> torch.Tensor:
        """Return it in float32, [P, R, N] for R = ``n_rows``."""
        scaled = self.y.float().mul_(self.channel).mul_(self.scale.unsqueeze(1))
        return scaled.view(-1, n_rows, self.y.shape[1])


class Int8Linear:
    """The int8 weights of a linear layer; its bias is in the reference's product."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Round ``weight`` [out, in] to int8 with one scale an output channel."""
        channel = weight.abs().amax(1).clamp_min(1e-30) / 127
        self.channel = channel.contiguous()
        self._q = (weight / channel.unsqueeze(1)).round().to(torch.int8).t().contiguous()

    def __call__(self, difference: Difference) -> Product:
        """Multiply."""
        return Product(torch._int_mm(difference.q, self._q), difference.scale, self.channel)


@functools.cache
def int8_problem() -> str:
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

    def difference(self, x: torch.Tensor) -> Difference:
        """Return block ``x`` [1 + P, R, K] relative to its reference."""
        return _quantise((x[1:] - x[0]).view(-1, x.shape[2]))

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
        return _quantise(total.sub_(active).view(-1, active.shape[1]))


def _quantise(rows: torch.Tensor) -> Difference:
    top = rows.abs().amax(1)
    q = rows.mul_((127 / top.clamp_min(1e-30)).unsqueeze(1)).round_()
    return Difference(q.to(torch.int8), top / 127)


class NativeSteps(TorchSteps):
    """The steps in C: each reads and writes a row once."""

    name = "C"

    def __init__(self, library: ctypes.CDLL) -> None:
        """Call ``library``, made from ``native/int8.c``."""
        self._library = library

    def difference(self, x: torch.Tensor) -> Difference:
        """See `TorchSteps.difference`."""
        p, r, k = len(x) - 1, x.shape[1], x.shape[2]
        made = _empty(p * r, k)
        self._call("mp2_difference", x, made.q, made.scale, p, r, k)
        return made

    def add(self, product: Product, out: torch.Tensor) -> None:
        """See `TorchSteps.add`."""
        self._call("mp2_add", *_parts(product), out, len(out) - 1, *out.shape[1:])

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
        made = _empty(p * r, n) if difference else None
        q, scale = (None, None) if made is None else (made.q, made.scale)
        shared = len(residual) == 1
        self._call(
            "mp2_add_norm",
            *(*_parts(product), reference, residual, shared, *norm, eps, out, q, scale),
            *(p, r, n),
        )
        return made

    def add_activate(
        self, product: Product, reference: torch.Tensor, active: torch.Tensor, activation: str
    ) -> Difference:
        """See `TorchSteps.add_activate`."""
        r, n = active.shape
        made = _empty(len(product.y), n)
        kind = ACTIVATIONS[activation]
        self._call(
            "mp2_add_activate",
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
        getattr(self._library, name)(*addresses, torch.get_num_threads())


def _empty(rows: int, width: int) -> Difference:
    return Difference(torch.empty(rows, width, dtype=torch.int8), torch.empty(rows))


def _parts(product: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return product.y, product.scale, product.channel


def make_steps() -> TorchSteps:
    """Return the C steps if they can be had, else torch's."""
    library = native.load()
    return TorchSteps() if library is None else NativeSteps(library)

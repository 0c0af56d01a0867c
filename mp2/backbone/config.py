"""The shape of a backbone."""

from __future__ import annotations

from dataclasses import dataclass

from mp2.errors import UsageError

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Shape of a post-LN BERT-family encoder: L layers, hidden H, h heads of size d_h = H / h.

    ``activation`` is one of ``gelu`` (exact, with erf), ``gelu_tanh`` and ``relu``. ``token_type`` is
    the type of every token, 0 to ``type_vocab_size`` - 1: 1 in CPT, which was trained so, else 0.
    """

    name: str
    n_layers: int
    hidden: int
    n_heads: int
    ffn: int
    vocab_size: int
    max_positions: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"
    token_type: int = 0

    def __post_init__(self) -> None:
        for field in (
            "n_layers",
            "hidden",
            "n_heads",
            "ffn",
            "vocab_size",
            "max_positions",
            "type_vocab_size",
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"backbone '{self.name}': {field} is {value!r}, expected a positive integer")
        if not 0 <= self.token_type < self.type_vocab_size:
            raise UsageError(
                f"backbone '{self.name}': token_type is {self.token_type}, expected 0 to "
                f"{self.type_vocab_size - 1}"
            )
        if self.hidden % self.n_heads:
            raise UsageError(
                f"backbone '{self.name}': hidden size {self.hidden} is not a multiple of {self.n_heads} heads"
            )
        if self.activation not in ACTIVATIONS:
            raise UsageError(
                f"backbone '{self.name}': activation '{self.activation}' is not supported, "
                f"expected one of {', '.join(ACTIVATIONS)}"
            )

    @property
    def head_size(self) -> int:
        """Size d_h of one attention head."""
        return self.hidden // self.n_heads

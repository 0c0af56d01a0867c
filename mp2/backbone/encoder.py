"""A BERT-family encoder that can be called layer by layer, from any layer, under any prompt.

Shapes: B any batch, N sequences, T tokens, P candidates, m prompt tokens, H hidden, h heads, d_h head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mp2.backbone.config import BackboneConfig

Prefix = tuple[Tensor, Tensor]
"""Keys and values of one layer's prefix, each [B or 1, h, m, d_h]."""

PLACEHOLDER = 1000
"""Token id of the first inline row of deep prompts (authors' code: ids 1000 to 1000 + m - 1)."""


def add_to_rows(hidden: Tensor, prompts: Tensor) -> Tensor:
    """Hidden states [..., m + T, H] with ``prompts`` [..., m, H] added to the rows after [CLS]: 1 to m."""
    return hidden + F.pad(prompts, (0, 0, 1, hidden.shape[-2] - 1 - prompts.shape[-2]))


def activate(name: str, x: Tensor) -> Tensor:
    """Apply the feed-forward activation ``name`` (see ``BackboneConfig``)."""
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return F.relu(x)


class Layer(nn.Module):
    """One post-LN transformer layer (Devlin et al., 2019) with optional prefix keys and values."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden, config.layer_norm_eps
        self.n_heads = config.n_heads
        self.head_size = config.head_size
        self.activation = config.activation
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=eps)
        self.intermediate = nn.Linear(hidden, config.ffn)
        self.output = nn.Linear(config.ffn, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=eps)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, T, H] -> [B, h, T, d_h]."""
        return x.view(*x.shape[:-1], self.n_heads, self.head_size).transpose(1, 2)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, prefix: Prefix | None = None) -> Tensor:
        """Hidden states [B, T, H] -> [B, T, H].

        ``mask`` [B, T] is True at real tokens. ``prefix`` keys and values are put before the layer's own;
        prefix rows have no queries and no feed-forward, and are never masked.
        """
        queries = self.split_heads(self.query(hidden))
        keys = self.split_heads(self.key(hidden))
        values = self.split_heads(self.value(hidden))
        attention_mask = None if mask is None else mask[:, None, None, :]
        if prefix is not None:
            n = hidden.shape[0]
            keys = torch.cat([prefix[0].to(keys.dtype).expand(n, -1, -1, -1), keys], dim=2)
            values = torch.cat([prefix[1].to(values.dtype).expand(n, -1, -1, -1), values], dim=2)
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (prefix[0].shape[2], 0), value=True)
        if (
            attention_mask is not None
        ):  # [B, 1, T, m + T]: the fused CPU kernel wants the query axis spelled out
            attention_mask = attention_mask.expand(-1, -1, hidden.shape[1], -1)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=attention_mask)
        mixed = self.attention_output(mixed.transpose(1, 2).flatten(2))
        hidden = self.attention_norm(mixed + hidden)
        inner = activate(self.activation, self.intermediate(hidden))
        normed: Tensor = self.output_norm(self.output(inner) + hidden)
        return normed


def _table(n: int, hidden: int) -> nn.Embedding:
    """Rows that are not initialised: to draw them on the meta device, torch would load its compiler (2 s)."""
    return nn.Embedding(n, hidden, _weight=torch.empty(n, hidden))


class Encoder(nn.Module):
    """The frozen body: embed, layer 0 .. L-1, each callable alone.

    Every token has the configuration's token type. There is no dropout, in training neither.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = _table(config.vocab_size, config.hidden)
        self.position_embeddings = _table(config.max_positions, config.hidden)
        self.token_type_embeddings = _table(config.type_vocab_size, config.hidden)
        self.embedding_norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))

    def embed(self, input_ids: Tensor, n_inline: int = 0) -> Tensor:
        """Token ids [N, T] -> hidden states [N, T, H] that enter layer 0.

        ``n_inline`` prompt rows stand after [CLS]: the positions of all later tokens are shifted by as many.

        Raises:
            ValueError: the sequence and the rows do not fit the position table.
        """
        length = input_ids.shape[-1]
        if length + n_inline > self.config.max_positions:
            raise ValueError(
                f"{length} tokens and {n_inline} inline prompt rows, expected at most "
                f"{self.config.max_positions} positions in backbone '{self.config.name}'"
            )
        positions = torch.arange(length, device=input_ids.device)
        positions[1:] += n_inline
        return self._embed(self.word_embeddings(input_ids), self.position_embeddings(positions))

    def embed_inline(self, prompts: Tensor) -> Tensor:
        """Soft prompts [P, m, H] -> their hidden states [P, m, H] at positions 1..m, entering layer 0."""
        m = prompts.shape[1]
        if 1 + m > self.config.max_positions:
            raise ValueError(f"{m} inline prompt rows, expected at most {self.config.max_positions - 1}")
        return self._embed(prompts, self.position_embeddings.weight[1 : m + 1])

    def placeholders(self, m: int) -> Tensor:
        """Word embeddings [1, m, H] of the tokens that deep inline prompts are added to.

        Their ids are 1000, 1001, ... whatever the tokens mean; a smaller vocabulary is counted round.
        """
        device = self.word_embeddings.weight.device
        ids = torch.arange(PLACEHOLDER, PLACEHOLDER + m, device=device) % self.config.vocab_size
        words: Tensor = self.word_embeddings(ids)
        return words[None]

    @property
    def token_type_row(self) -> Tensor:
        """Embedding [H] of the token type that every token has."""
        return self.token_type_embeddings.weight[self.config.token_type]

    def _embed(self, words: Tensor, positions: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_norm(words + positions + self.token_type_row)
        return embedded

    def layer(
        self, i: int, hidden: Tensor, mask: Tensor | None = None, prefix: Prefix | None = None
    ) -> Tensor:
        """Run layer ``i`` alone; see ``Layer.forward``."""
        out: Tensor = self.body(i)(hidden, mask, prefix)
        return out

    def body(self, i: int) -> Layer:
        """Return layer ``i`` itself."""
        layer = self.layers[i]
        assert isinstance(layer, Layer)
        return layer

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        prefixes: Sequence[Prefix | None] | None = None,
        inline: Tensor | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """Token ids [N, T] -> last hidden states of the tokens [N, T, H].

        ``prefixes`` holds one prefix a layer (deep prompts); ``inline`` [N or 1, m, H] are soft prompts that
        enter the sequence itself after [CLS] (shallow prompts); ``added`` [L or 1, m, H] are soft prompts of
        every layer, or of layer 0, that are injected as the authors' code does it: the rows after [CLS] are m
        placeholder tokens, and before layer l their hidden states h_1 .. h_m become h_j + added[l, j]. The
        rows are dropped from the result.
        """
        words = inline if added is None else self.placeholders(added.shape[1])
        m = 0 if words is None else words.shape[1]
        hidden = self.embed(input_ids, n_inline=m)
        if words is not None:
            rows = self.embed_inline(words).expand(len(hidden), -1, -1)
            hidden = torch.cat([hidden[:, :1], rows, hidden[:, 1:]], dim=1)
            if mask is not None:
                mask = torch.cat([mask[:, :1], mask.new_ones(len(mask), m), mask[:, 1:]], dim=1)
        for i in range(self.config.n_layers):
            if added is not None and i < len(added):
                hidden = add_to_rows(hidden, added[i])
            hidden = self.layer(i, hidden, mask, None if prefixes is None else prefixes[i])
        if m:
            hidden = torch.cat([hidden[:, :1], hidden[:, 1 + m :]], dim=1)
        return hidden

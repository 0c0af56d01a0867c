"""What a good engineer would write with Hugging Face's BertModel: the rivals of every speed figure.

All have the mathematics of mp2 (deep prompts as keys and values before a layer's own), so their losses are
ours; each keeps the keys and values of the layers that are not under visit.

- **A**: one candidate a call, all examples padded to the longest;
- **B**: the whole population in one call, examples in buckets of equal length, nothing padded, torch's fused
  attention (SDPA);
- **C**: B, and the layers below the visited one are not computed again: their output is kept.

The plain loop beside them (`benchmarks.speed.plain_loop`) is what the authors' code does.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mp2.backbone import Backbone, save_backbone
from mp2.prompts import PromptSet
from mp2.tasks import MrcInput

RIVALS = ("A", "B", "C")
_ATTENTION = "mp2_rival"  # its name in transformers
Rows = tuple[torch.Tensor, torch.Tensor]  # keys and values of prompts [P or 1, h, m, d_h]


@dataclass(eq=False)
class _Bucket:
    ids: torch.Tensor  # [n, T]
    mask: torch.Tensor | None  # [n, T] bool; None: nothing is padded
    gold: torch.Tensor  # [n, 2] start and end
    where: np.ndarray  # [n] of the inputs
    layer: int = 0  # whose input is kept
    hidden: torch.Tensor | None = None  # [n, T, H]


class Rival:
    """Losses of candidates that differ in one layer from an incumbent, computed as ``kind`` A, B or C."""

    def __init__(
        self,
        kind: str,
        backbone: Backbone,
        prompts: PromptSet,
        inputs: Sequence[MrcInput],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        compiled: bool = False,
        like: Rival | None = None,
    ) -> None:
        """Copy the backbone's weights into a ``BertModel``; deep prompts with prefix injection only.

        ``dtype`` is that of weights and hidden states; logits and losses are in float32. ``compiled``: the
        layers go through ``torch.compile``. The weights are those of ``like``, if it is given.
        """
        from transformers import AttentionInterface, BertModel, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        AttentionInterface.register(_ATTENTION, _attend)
        if like is None:
            with tempfile.TemporaryDirectory() as folder:
                save_backbone(backbone, Path(folder))
                model = BertModel.from_pretrained(
                    folder, add_pooling_layer=False, attn_implementation=_ATTENTION
                )
            self._model = model.eval().to(device, dtype)
        else:
            self._model = like._model
        self.kind, self.prompts = kind, prompts
        self._layers: list[Any] = list(self._model.encoder.layer)
        if compiled:
            self._layers = [torch.compile(layer, dynamic=True) for layer in self._layers]
        self._projection = prompts.projection.to(device)
        self._span = prompts.span_weight.to(device), prompts.span_bias.to(device)
        self._device, self._dtype = device, dtype
        groups = [list(range(len(inputs)))]
        if kind != "A":
            lengths: dict[int, list[int]] = defaultdict(list)
            for i, item in enumerate(inputs):
                lengths[item.n_tokens].append(i)
            groups = list(lengths.values())
        self._n = len(inputs)
        self._buckets = [self._bucket([inputs[i] for i in group], group, backbone) for group in groups]
        self._incumbent: list[Rows] = []

    @torch.inference_mode()
    def set_incumbent(self, z: np.ndarray) -> None:
        """Take ``z`` [L, d] as what the layers that are not under visit have."""
        self._incumbent = [self._rows(i, z[i : i + 1]) for i in range(len(self._layers))]
        for bucket in self._buckets:
            bucket.layer, bucket.hidden = 0, None

    @torch.inference_mode()
    def layer_losses(self, layer: int, z: np.ndarray) -> np.ndarray:
        """Losses [P] of candidates with ``z`` [P, d] at ``layer``: mean start and end cross-entropy."""
        if self.kind == "A":
            return np.concatenate([self._losses(layer, z[p : p + 1]) for p in range(len(z))])
        return self._losses(layer, z)

    @torch.inference_mode()
    def commit(self, layer: int, z: np.ndarray) -> None:
        """Make ``z`` [d] the incumbent's at ``layer``."""
        self._incumbent[layer] = self._rows(layer, z[None])
        for bucket in self._buckets:
            if bucket.layer > layer:
                bucket.layer, bucket.hidden = 0, None

    def _losses(self, layer: int, z: np.ndarray) -> np.ndarray:
        rows = [*self._incumbent[:layer], self._rows(layer, z), *self._incumbent[layer + 1 :]]
        losses = np.empty((len(z), self._n))
        for bucket in self._buckets:
            n, t = bucket.ids.shape
            first, hidden = self._start(bucket, layer)
            hidden = hidden.expand(len(z), n, t, -1).reshape(len(z) * n, t, -1)
            for i in range(first, len(self._layers)):
                hidden = self._layer(i, hidden, rows[i], bucket.mask, len(z))
            logits = (hidden.float() @ self._span[0].T + self._span[1]).view(len(z), n, t, 2)
            if bucket.mask is not None:
                logits = logits.masked_fill(~bucket.mask[None, :, :, None], -torch.inf)
            logp = logits.log_softmax(2)
            gold = bucket.gold[None, :, None, :].expand(len(z), n, 1, 2)
            losses[:, bucket.where] = -logp.gather(2, gold)[:, :, 0].mean(2).double().cpu().numpy()
        found: np.ndarray = losses.mean(1)
        return found

    def _start(self, bucket: _Bucket, layer: int) -> tuple[int, torch.Tensor]:
        """The layer to begin with and its input [n, T, H]; C alone begins above the embedding."""
        if bucket.hidden is None or bucket.layer > layer:
            bucket.layer, bucket.hidden = 0, self._model.embeddings(input_ids=bucket.ids)
        hidden = bucket.hidden
        if self.kind == "C":
            for i in range(bucket.layer, layer):
                hidden = self._layer(i, hidden, self._incumbent[i], bucket.mask, 1)
            bucket.layer, bucket.hidden = layer, hidden
        return bucket.layer, hidden

    def _layer(
        self, index: int, hidden: torch.Tensor, rows: Rows, mask: torch.Tensor | None, p: int
    ) -> torch.Tensor:
        _, keys, _ = shape = rows[0].shape[1:]
        n = len(hidden) // p
        own = tuple(x.unsqueeze(1).expand(p, n, *shape).reshape(p * n, *shape).to(self._dtype) for x in rows)
        bias = None
        if mask is not None:
            seen = torch.cat([mask.new_ones(n, keys), mask], 1)
            bias = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device).masked_fill_(
                ~seen, -torch.inf
            )
            bias = bias[:, None, None].expand(n, 1, hidden.shape[1], -1).repeat(p, 1, 1, 1)
        found = self._layers[index](hidden, attention_mask=None, prefix=own, bias=bias)
        return found[0] if isinstance(found, tuple) else found

    def _rows(self, layer: int, z: np.ndarray) -> Rows:
        """Keys and values [P, h, m, d_h] of intrinsic prompts ``z`` [P, d]."""
        meta = self.prompts.meta
        z_there = torch.from_numpy(np.ascontiguousarray(z, np.float32)).to(self._device)
        rows = (z_there @ self._projection[layer]).view(-1, meta.prompt_tokens, meta.hidden).to(self._dtype)
        body = self._model.encoder.layer[layer].attention.self
        heads = body.num_attention_heads
        keys, values = (
            part(rows).view(*rows.shape[:2], heads, -1).transpose(1, 2) for part in (body.key, body.value)
        )
        return keys, values

    def _bucket(self, inputs: list[MrcInput], where: list[int], backbone: Backbone) -> _Bucket:
        length = max(x.n_tokens for x in inputs)
        ids = torch.full((len(inputs), length), backbone.tokenizer.pad_id)
        for row, item in enumerate(inputs):
            ids[row, : item.n_tokens] = torch.from_numpy(np.asarray(item.input_ids))
        mask = torch.arange(length)[None] < torch.tensor([[x.n_tokens] for x in inputs])
        gold = torch.tensor([[x.start, x.end] for x in inputs])
        padded = not bool(mask.all())
        place = self._device
        return _Bucket(ids.to(place), mask.to(place) if padded else None, gold.to(place), np.array(where))


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix: Rows,
    bias: torch.Tensor | None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with ``prefix`` before keys and values, as transformers wants its attention functions."""
    key, value = (torch.cat([own, x], 2) for own, x in zip(prefix, (key, value), strict=True))
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return context.transpose(1, 2), None

"""The baseline of every speed figure: what one would write without mp2.

Hugging Face ``BertModel``; deep prompts enter inline as the authors' code does it: 50 (m) placeholder
positions after [CLS], ids 1000 and up, to which a forward hook adds the layer's prompt p^(l) = z A before
every layer. One candidate a call, all examples in one batch, padded to the longest. Padding is masked
(the authors' code does not), so that the loss means the same as ours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mp2.backbone import Backbone, save_backbone
from mp2.prompts import PromptSet
from mp2.tasks import MrcInput

PLACEHOLDER = 1000


class PlainLoop:
    """Losses of one candidate at a time."""

    def __init__(
        self,
        backbone: Backbone,
        prompts: PromptSet,
        inputs: Sequence[MrcInput],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Copy the backbone's weights into a ``BertModel`` and pad ``inputs`` into one batch.

        Shallow prompts are added before the first layer only. ``dtype`` is that of weights and hidden states;
        prompts, logits and losses stay in float32.
        """
        from transformers import BertModel, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            save_backbone(backbone, Path(folder))
            self.model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval().to(device, dtype)
        self.prompts = prompts
        m = prompts.meta.prompt_tokens
        length = max(x.n_tokens for x in inputs) + m
        self.ids = torch.full((len(inputs), length), backbone.tokenizer.pad_id)
        self.mask = torch.zeros(len(inputs), length, dtype=torch.long)
        placeholders = torch.arange(PLACEHOLDER, PLACEHOLDER + m) % backbone.config.vocab_size
        for row, item in enumerate(inputs):
            ids = torch.from_numpy(item.input_ids)
            self.ids[row, : len(ids) + m] = torch.cat([ids[:1], placeholders, ids[1:]])
            self.mask[row, : len(ids) + m] = 1
        self.real = self.mask.bool().clone()
        self.real[:, 1 : m + 1] = False  # placeholders have no logits
        shift = torch.tensor([[m if x.start else 0, m if x.end else 0] for x in inputs])
        self.gold = torch.tensor([[x.start, x.end] for x in inputs]) + shift
        self.added: list[torch.Tensor] = []
        self.ids, self.mask, self.real = self.ids.to(device), self.mask.to(device), self.real.to(device)
        self.gold, self.device = self.gold.to(device), device
        self.projection = prompts.projection.to(device)
        self.span = prompts.span_weight.to(device), prompts.span_bias.to(device)
        for i, layer in enumerate(self.model.encoder.layer[: len(prompts.z)]):
            layer.register_forward_pre_hook(self._hook(i), with_kwargs=True)

    def _hook(self, layer: int) -> Any:
        def add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0].clone()
            prompt = self.added[layer]
            hidden[:, 1 : len(prompt) + 1] += prompt.to(hidden.dtype)
            return (hidden, *args[1:]), kwargs

        return add

    @torch.no_grad()
    def loss(self, z: np.ndarray) -> float:
        """Mean of start and end cross-entropy under intrinsic prompts z [L, d]."""
        meta = self.prompts.meta
        flat = torch.einsum("ld,ldx->lx", torch.from_numpy(z).to(self.device), self.projection)
        self.added = list(flat.view(len(flat), meta.prompt_tokens, meta.hidden))
        hidden = self.model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
        logits = hidden.to(self.span[0].dtype) @ self.span[0].T + self.span[1]
        logits = logits.masked_fill(~self.real[..., None], -torch.inf)
        logp = logits.log_softmax(1)
        rows = torch.arange(len(logp), device=logp.device)
        return float(-(logp[rows, self.gold[:, 0], 0] + logp[rows, self.gold[:, 1], 1]).mean() / 2)

"""The baseline of the pre-training speed figure: what one would write with Hugging Face and PyTorch alone.

A frozen ``BertModel``; the same modular prompts, routers and span head as trainable tensors. Deep prompts go
in as past key values (each layer's own key and value projections of p = z A), shallow ones as input
embeddings after [CLS]. It is given batches, ours, padded to their longest; padding is masked.
``torch.optim.Adam`` as it comes. The loss is ours to rounding.
"""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mp2.backbone import Backbone, save_backbone
from mp2.prompts import ModularPrompts
from mp2.training.mixture import Batch


class PlainTraining:
    """One optimizer step at a time on prompts that start as ``prompts``."""

    def __init__(
        self,
        backbone: Backbone,
        prompts: ModularPrompts,
        rates: tuple[float, float],
        device: torch.device,
        precision: str,
    ) -> None:
        from transformers import BertModel, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            save_backbone(backbone, Path(folder))
            self.model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval().to(device)
        self.model.requires_grad_(False)
        taken = inspect.signature(BertModel.forward).parameters  # transformers 5.24 gave it another name
        self._cache_name = "cache" if "cache" in taken else "past_key_values"
        self.meta = prompts.meta
        self.parameters = {
            name: nn.Parameter(p.detach().clone().to(device)) for name, p in prompts.named_parameters()
        }
        routers = self.parameters["routers"]
        others = [p for name, p in self.parameters.items() if name != "routers"]
        self.optimizer = torch.optim.Adam(
            [{"params": [routers], "lr": rates[0]}, {"params": others, "lr": rates[1]}]
        )
        self.device, self.precision = device, precision

    def step(self, batch: Batch) -> float:
        """Forward, backward, update; returns the loss."""
        u = torch.rand(self.parameters["routers"].shape[1:], device=self.device).clamp(1e-6, 1 - 1e-6)
        weights = torch.sigmoid(self.parameters["routers"][batch.task] + u.log() - (-u).log1p())
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.loss(batch.to(self.device), weights)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def loss(self, batch: Batch, weights: Tensor) -> Tensor:
        """Mean span loss of a batch under router weights [L', K]."""
        ids, mask = batch.input_ids, batch.mask.long()
        z = torch.einsum("lk,lkd->ld", weights, self.parameters["z"]) / self.meta.n_modules
        flat = torch.einsum("ld,ldx->lx", z, self.parameters["projection"])
        prompts = flat.view(-1, self.meta.prompt_tokens, self.meta.hidden)
        hidden = (
            self._deep(ids, mask, prompts) if self.meta.kind == "deep" else self._shallow(ids, mask, prompts)
        )
        logits = hidden.float() @ self.parameters["span_weight"].T + self.parameters["span_bias"]
        logits = logits.masked_fill(~mask.bool()[..., None], -torch.inf)
        return (F.cross_entropy(logits[..., 0], batch.start) + F.cross_entropy(logits[..., 1], batch.end)) / 2

    def _deep(self, ids: Tensor, mask: Tensor, prompts: Tensor) -> Tensor:
        from transformers import DynamicCache

        cache, (n, length), m = DynamicCache(), ids.shape, self.meta.prompt_tokens
        for i, layer in enumerate(self.model.encoder.layer):
            attention = layer.attention.self
            shape = (1, m, self.meta.n_heads, -1)
            keys, values = (
                f(prompts[i]).view(shape).transpose(1, 2).expand(n, -1, -1, -1)
                for f in (attention.key, attention.value)
            )
            cache.update(keys, values, i)
        seen = torch.cat([mask.new_ones(n, m), mask], 1)
        positions = torch.arange(length, device=ids.device)[None]
        inputs = {"input_ids": ids, "attention_mask": seen, "position_ids": positions}
        return self._last(**inputs, **{self._cache_name: cache})

    def _shallow(self, ids: Tensor, mask: Tensor, prompts: Tensor) -> Tensor:
        words = self.model.embeddings.word_embeddings(ids)
        n, m = len(ids), self.meta.prompt_tokens
        rows = prompts.to(words.dtype).expand(n, -1, -1)
        embedded = torch.cat([words[:, :1], rows, words[:, 1:]], 1)
        seen = torch.cat([mask[:, :1], mask.new_ones(n, m), mask[:, 1:]], 1)
        hidden = self._last(inputs_embeds=embedded, attention_mask=seen)
        return torch.cat([hidden[:, :1], hidden[:, m + 1 :]], 1)

    def _last(self, **inputs: Any) -> Tensor:
        hidden: Tensor = self.model(**inputs).last_hidden_state
        return hidden

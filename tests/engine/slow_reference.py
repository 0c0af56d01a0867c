"""The few-shot losses by a slow float64 loop over single examples and candidates."""

from __future__ import annotations

import numpy as np
import torch

from mp2.backbone import Backbone
from mp2.engine import Forward, Scorer
from mp2.prompts import PromptSet
from mp2.tasks import MrcInput

M, D = 6, 10


def make_inputs(lengths: tuple[int, ...], vocab_size: int, seed: int = 0) -> list[MrcInput]:
    rng = np.random.default_rng(seed)
    inputs = []
    for k, n in enumerate(lengths):
        start = int(rng.integers(0, n))
        inputs.append(
            MrcInput(
                example=k,
                input_ids=rng.integers(5, vocab_size, n),
                start=start,
                end=int(rng.integers(start, n)),
                option_spans=np.empty((0, 2), np.int64),
            )
        )
    return inputs


def log_probs(forward: Forward, z: np.ndarray, inputs: list[MrcInput]) -> list[np.ndarray]:
    """The span head's outputs [T, 2] of each input's own tokens."""
    outputs = Scorer(forward).outputs(z, inputs).fetch()
    return [output[: len(item.input_ids)] for item, output in zip(inputs, outputs, strict=True)]


class SlowReference:
    """Everything in float64, one example and one candidate at a time, straight from the formulas."""

    def __init__(self, backbone: Backbone, prompts: PromptSet) -> None:
        self.config = backbone.config
        self.kind = prompts.kind
        self.w = {name: x.double() for name, x in backbone.encoder.state_dict().items()}
        self.a = prompts.projection.double()
        self.span = prompts.span_weight.double(), prompts.span_bias.double()

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + self.config.layer_norm_eps)
        return centred / scale * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def layer(self, i: int, x: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
        name, d = f"layers.{i}", self.config.head_size
        rows = x if prompt is None else torch.cat([prompt, x])  # projected as the text is
        query = self.linear(f"{name}.query", x)
        key, value = self.linear(f"{name}.key", rows), self.linear(f"{name}.value", rows)
        heads = []
        for h in range(self.config.n_heads):
            s = slice(h * d, (h + 1) * d)
            heads.append(torch.softmax(query[:, s] @ key[:, s].T / d**0.5, -1) @ value[:, s])
        y = self.linear(f"{name}.attention_output", torch.cat(heads, -1))
        y = self.norm(f"{name}.attention_norm", y + x)
        up = self.linear(f"{name}.intermediate", y)
        up = 0.5 * up * (1 + torch.erf(up / 2**0.5))
        return self.norm(f"{name}.output_norm", self.linear(f"{name}.output", up) + y)

    def embedding(self, words: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = (
            words
            + self.w["position_embeddings.weight"][positions]
            + self.w["token_type_embeddings.weight"][self.config.token_type]
        )
        return self.norm("embedding_norm", x)

    def log_probs(self, z: np.ndarray, ids: np.ndarray) -> torch.Tensor:
        """[T, 2] for intrinsic prompts [L', d]."""
        prompts = torch.einsum("ld,ldk->lk", torch.from_numpy(z).double(), self.a).view(len(z), M, -1)
        words = self.w["word_embeddings.weight"][torch.from_numpy(ids)]
        positions = torch.arange(len(ids))
        if self.kind == "deep":
            x = self.embedding(words, positions)
            for i in range(self.config.n_layers):
                x = self.layer(i, x, prompts[i])
        else:
            words = torch.cat([words[:1], prompts[0], words[1:]])
            x = self.embedding(words, torch.arange(len(words)))
            for i in range(self.config.n_layers):
                x = self.layer(i, x, None)
            x = torch.cat([x[:1], x[1 + M :]])
        return torch.log_softmax(x @ self.span[0].T + self.span[1], 0)

    def loss(self, z: np.ndarray, inputs: list[MrcInput]) -> float:
        total = 0.0
        for item in inputs:
            logp = self.log_probs(z, item.input_ids)
            total += -float(logp[item.start, 0] + logp[item.end, 1]) / 2
        return total / len(inputs)

    def losses(self, z: np.ndarray, inputs: list[MrcInput]) -> np.ndarray:
        return np.array([self.loss(one, inputs) for one in z])

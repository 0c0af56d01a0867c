"""The stages of the encoder as calls of an engine folder's chain graphs, whatever runs these."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch

from mp2.backbone import Backbone
from mp2.engine.backend import PopulationPrefix
from mp2.engine.chain import ChainBackend
from mp2.engine.folder import layer_file, plain_layer_file
from mp2.engine.forward import check_positions

HIDDEN_TYPES = {  # by precision: of the weights and of the hidden states between the graphs
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float16,
}


class GraphStages(ChainBackend):
    """The stages over ``embed``, ``embed_inline``, ``layer_XX``, ``layer_XX_plain`` and ``head``."""

    def __init__(self, backbone: Backbone, *, device: str, precision: str, reason: str) -> None:
        """Run graphs of ``backbone`` in ``precision`` on ``device``."""
        self.backbone = backbone
        self.device = device
        self.precision = precision
        self.reason = reason
        self._config = backbone.config
        self._whole: dict[tuple[int, int], torch.Tensor] = {}  # masks of batches without padding

    def embed(self, input_ids: torch.Tensor, n_inline: int = 0) -> torch.Tensor:
        """See `ChainBackend.embed`."""
        n, t = input_ids.shape
        check_positions(t, n_inline, self._config.max_positions)
        feeds = {"input_ids": input_ids, "n_inline": torch.tensor(n_inline)}
        return self._run("embed.onnx", feeds, (1, n, t, self._config.hidden))

    def embed_inline(self, prompts: torch.Tensor) -> torch.Tensor:
        """See `ChainBackend.embed_inline`."""
        p, m, width = prompts.shape
        return self._run("embed_inline.onnx", {"prompts": prompts}, (p, 1, m, width))

    def layer(
        self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: PopulationPrefix | None
    ) -> torch.Tensor:
        """See `ChainBackend.layer`."""
        p, n, t, width = hidden.shape
        feeds = {"hidden": hidden, "mask": self._no_padding(n, t) if mask is None else mask}
        many = p if prefix is None else max(p, prefix[0].shape[0])
        if prefix is None or prefix[0].shape[3] == 0:
            feeds["hidden"] = hidden.expand(many, n, t, width)
            return self._run(plain_layer_file(index), feeds, (many, n, t, width))
        feeds |= {"prefix_keys": prefix[0], "prefix_values": prefix[1]}
        return self._run(layer_file(index, "onnx"), feeds, (many, n, t, width))

    def head(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return float32 span logits [P, N, T, 2] for ``weight`` [2, H] and ``bias`` [2]."""
        feeds = {"hidden": hidden, "span_weight": weight, "span_bias": bias}
        return self._run("head.onnx", feeds, (*hidden.shape[:-1], 2), "logits")

    def _no_padding(self, n: int, t: int) -> torch.Tensor:
        if (n, t) not in self._whole:
            self._whole[n, t] = torch.ones(n, t, dtype=torch.bool, device=self.device)
        return self._whole[n, t]

    @abstractmethod
    def _run(
        self, graph: str, feeds: Mapping[str, torch.Tensor], shape: Sequence[int], output: str = "hidden_out"
    ) -> torch.Tensor:
        """Return ``output`` of ``graph``, which has ``shape``, for ``feeds`` of any type and device."""

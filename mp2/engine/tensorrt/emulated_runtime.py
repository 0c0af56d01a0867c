"""A typed engine folder's chain on the CPU, rounding where a TensorRT engine would; for comparisons only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mp2.backbone import Backbone
from mp2.engine.folder import layer_file
from mp2.engine.onnx.session import OnnxSession
from mp2.engine.runtime import Prefix
from mp2.export.tensorrt.emulate import emulated
from mp2.export.tensorrt.graphs import plain_layer_file


class EmulatedRuntime:
    """`Runtime` over the emulated graphs of ``folder``; hidden states are float32 with half values."""

    name = "emulated"
    device = "cpu"

    def __init__(self, backbone: Backbone, folder: Path, precision: str) -> None:
        """Read graphs when they are first used; ``folder`` may be an export that is not finished."""
        self.precision = precision
        self.reason = "a comparison without a GPU"
        self._folder = folder
        self._config = backbone.config
        self._sessions: dict[str, OnnxSession] = {}

    def embed(self, input_ids: torch.Tensor, n_inline: int = 0) -> torch.Tensor:
        """See `Runtime.embed`."""
        feeds = {"input_ids": input_ids, "n_inline": torch.tensor(n_inline)}
        return self._run("embed.onnx", feeds, (1, *input_ids.shape, self._config.hidden))

    def embed_inline(self, prompts: torch.Tensor) -> torch.Tensor:
        """See `Runtime.embed_inline`."""
        p, m, width = prompts.shape
        return self._run("embed_inline.onnx", {"prompts": prompts}, (p, 1, m, width))

    def layer(
        self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: Prefix | None
    ) -> torch.Tensor:
        """See `Runtime.layer`."""
        p, n, t, width = hidden.shape
        feeds = {"hidden": hidden, "mask": torch.ones(n, t, dtype=torch.bool) if mask is None else mask}
        if prefix is None:
            return self._run(plain_layer_file(index), feeds, (p, n, t, width))
        feeds |= {"prefix_keys": prefix[0], "prefix_values": prefix[1]}
        return self._run(layer_file(index, "onnx"), feeds, (max(p, prefix[0].shape[0]), n, t, width))

    def head(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """See `Runtime.head`."""
        feeds = {"hidden": hidden, "span_weight": weight, "span_bias": bias}
        return self._run("head.onnx", feeds, (*hidden.shape[:-1], 2), "logits")

    def _run(
        self,
        graph: str,
        feeds: Mapping[str, torch.Tensor],
        shape: Sequence[int],
        output: str = "hidden_out",
    ) -> torch.Tensor:
        if graph not in self._sessions:
            self._sessions[graph] = OnnxSession(emulated(self._folder / graph).SerializeToString())
        return self._sessions[graph].run(feeds, {output: shape})[0]

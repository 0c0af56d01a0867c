"""What a batch computes on the packed layers, from intrinsic prompts to losses; all of it can be recorded."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mp2.backbone import Backbone
from mp2.engine.cuda.pack import Pack
from mp2.engine.cuda.runtime import CudaRuntime
from mp2.engine.runtime import Prefix
from mp2.prompts import PromptSet


class PackedForward:
    """Forwards of candidates over a pack."""

    def __init__(self, runtime: CudaRuntime, backbone: Backbone, prompts: PromptSet) -> None:
        """Run ``prompts``' kind of candidates on ``runtime``."""
        self._runtime = runtime
        self._n_layers = backbone.config.n_layers
        self._deep = prompts.kind == "deep"
        self.prefix = runtime.projector(backbone, prompts)
        place = torch.device(runtime.device)
        self._span = tuple(
            x.detach().to(place, torch.float32) for x in (prompts.span_weight, prompts.span_bias)
        )
        runtime.settle()

    def losses(self, pack: Pack, z: torch.Tensor) -> torch.Tensor:
        """Return [P, n] float64 losses of ``z`` [P, L', d], (CE of the start + CE of the end) / 2."""
        return self._cross_entropy(pack, self._every_layer(pack, z))

    def visit(
        self, layer: int, pack: Pack, text: torch.Tensor, z: torch.Tensor, above: Mapping[int, Prefix]
    ) -> torch.Tensor:
        """Return [P, n] losses with ``z`` [P, d] at ``layer``, whose input is ``text`` [1, S, H].

        Layers ``above`` have the prefixes given.
        """
        hidden = self._runtime.packed_layer(layer, text, pack, self.prefix(layer, z))
        for i in range(layer + 1, self._n_layers):
            hidden = self._runtime.packed_layer(i, hidden, pack, above[i])
        return self._cross_entropy(pack, hidden)

    def log_probs(self, pack: Pack, z: torch.Tensor) -> torch.Tensor:
        """Return float64 log-probabilities [P, n, longest, 2] of ``z`` [P, L', d]."""
        return self._log_probs(pack, self._every_layer(pack, z))

    def _every_layer(self, pack: Pack, z: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states [P, S, H]."""
        runtime = self._runtime
        hidden = runtime.embed_pack(pack, None if self._deep else self.prefix.inline(z[:, 0]))
        for i in range(self._n_layers):
            own = self.prefix(i, z[:, i]) if self._deep else None
            hidden = runtime.packed_layer(i, hidden, pack, own)
        return hidden

    def _log_probs(self, pack: Pack, hidden: torch.Tensor) -> torch.Tensor:
        return self._runtime.packed_log_probs(hidden, pack, *self._span)

    def _cross_entropy(self, pack: Pack, hidden: torch.Tensor) -> torch.Tensor:
        logp = self._log_probs(pack, hidden)
        gold = torch.stack([pack.start, pack.end], -1).view(1, -1, 1, 2).expand(len(logp), -1, -1, -1)
        return -logp.gather(2, gold).squeeze(2).mean(-1)

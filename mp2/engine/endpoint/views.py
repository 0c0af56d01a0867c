"""What a head reads of a server's answer: as little as it needs, in the form of hidden states.

A server returns outputs of the whole graph, not the states of a layer. Each head has a view of them that
looks like states of a few tokens, so that the head itself is the one that every other backend uses:

- the span head: the logits are states of width 2, read by an identity;
- the ridge head: the mean of each text field at its layer is a "token" of its own;
- label words: the state at each [MASK] is one.

p candidates, n examples, S segments, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from mp2.engine.chain import Bucket, GridStates
from mp2.heads import FittedRidge, Head, LabelWordHead, RidgeHead, SpanHead


@dataclass(frozen=True)
class View:
    """How a head reads the graph's outputs."""

    outputs: list[str]
    reader: Head  # of `states`
    kind: str

    def segments(self, batch: Bucket) -> np.ndarray:
        """Return the graph's input ``segments`` [n, S, 2] for a batch."""
        targets = batch.targets.numpy()
        if self.kind == "ridge":
            return np.ascontiguousarray(targets.reshape(len(targets), -1, 2))
        if self.kind == "mlm":  # each [MASK] alone; behind the last of a row, that one again
            most = int((targets[:, 1] - targets[:, 0]).max()) + 1
            at = np.minimum(targets[:, :1] + np.arange(most), targets[:, 1:])
            return np.stack([at, at], -1)
        return np.zeros((len(targets), 1, 2), np.int64)  # nothing is pooled

    def states(self, found: Mapping[str, np.ndarray], batch: Bucket) -> GridStates:
        """Return the states [1, n, ...] that `reader` reads, of one candidate."""
        if self.kind == "span":
            logits = np.stack([found["start_logits"], found["end_logits"]], -1)  # [n, T, 2]
            return GridStates(torch.from_numpy(logits)[None], batch)
        layer = -1 if self.reader.layer is None else self.reader.layer
        hidden = torch.from_numpy(np.ascontiguousarray(found["pooled"][:, :, layer]))[None]  # [1, n, S, H]
        n_segments = hidden.shape[2]
        first, last = batch.targets[:, 0], batch.targets[:, 1]
        if self.kind == "mlm":
            targets = torch.stack([torch.zeros_like(first), last - first], -1)
        else:
            each = torch.arange(n_segments).repeat_interleave(2)  # 0 0 1 1 ...
            targets = each.expand(len(first), -1)
        return GridStates(hidden, replace(batch, targets=targets, mask=None))


def view_of(head: Head) -> View:
    """Return how ``head`` reads a server's outputs."""
    if isinstance(head, SpanHead):
        return View(["start_logits", "end_logits"], SpanHead(torch.eye(2), torch.zeros(2)), "span")
    if isinstance(head, LabelWordHead):
        return View(["pooled"], head, "mlm")
    if isinstance(head, RidgeHead | FittedRidge):
        return View(["pooled"], head, "ridge")
    raise TypeError(f"no view for {type(head).__name__}")


def head_inputs(head: Head | None, hidden: int) -> dict[str, np.ndarray]:
    """Return the graph's inputs ``span_weight`` [1, 2, H] and ``span_bias`` [1, 2]: zeros for other heads."""
    if isinstance(head, SpanHead):
        weight, bias = head.weights
        return {"span_weight": weight.numpy()[None], "span_bias": bias.numpy()[None]}
    return {"span_weight": np.zeros((1, 2, hidden), np.float32), "span_bias": np.zeros((1, 2), np.float32)}

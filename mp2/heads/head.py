"""The interface of a head: the engine computes hidden states, a head says what they mean.

Shapes: P candidates (p of them at a time), N examples (n at a time), T tokens, H hidden. A head works in two
places. On the device, `Head.training_outputs` and `Head.scoring_outputs` reduce the hidden states of a few
candidates and examples to as little as can be sent to the host. On the host, `Head.losses` turns the outputs
of *all* training examples into a loss a candidate, so that a loss need not be a mean over examples; and
`Head.scores` turns the output of one input into what an answer is chosen by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import torch

    from mp2.tasks import MrcInput


class States(Protocol):
    """Hidden states of p candidates and n examples, padded or packed: a head need not know."""

    @property
    def targets(self) -> Tensor:
        """The head's own `Head.targets` of these examples, [n, k] int64."""
        ...

    def each(self, change: Callable[[Tensor], Tensor], empty: float) -> Tensor:
        """Return ``change`` of every token's state, [..., H] -> [..., C], as [p, n, T, C].

        Cells after an example's last token are ``empty``.
        """
        ...

    def at(self, positions: Tensor) -> Tensor:
        """Return the states [p, n, H] at one token of each example, ``positions`` [n] int64."""
        ...


class Head(Protocol):
    """Losses and answers from hidden states; its weights are on one device."""

    @property
    def layer(self) -> int | None:
        """The layers that run below it: 0 reads the embeddings, None the last layer's states."""
        ...

    def to(self, device: torch.device) -> Head:
        """Return it with its weights on ``device``."""
        ...

    def targets(self, inputs: Sequence[MrcInput]) -> np.ndarray:
        """Return what the device must know of each input, [N, k] int64 (k may be 0)."""
        ...

    def training_outputs(self, states: States) -> Tensor:
        """Return [p, n, ...], on the device, of training examples."""
        ...

    def losses(self, outputs: np.ndarray) -> np.ndarray:
        """Return float64 losses [P] from `training_outputs` [P, N, ...] of all training examples."""
        ...

    def fit(self, outputs: Callable[[], np.ndarray]) -> Head:
        """Return the head that scores under one prompt.

        ``outputs()`` computes the `training_outputs` [N, ...] under that prompt, for heads whose answers
        depend on them; others return themselves.
        """
        ...

    def scoring_outputs(self, states: States) -> Tensor:
        """Return [p, n, ...], on the device, of examples to be scored."""
        ...

    def scores(self, item: MrcInput, output: np.ndarray) -> np.ndarray:
        """Return what the answer to ``item`` is chosen by, from its `scoring_outputs` [...].

        Log-scores [n_options], up to a constant, where it has options; else the log-probabilities [T, 2] of
        an answer's start and end.
        """
        ...

    def gold_losses(self, inputs: Sequence[MrcInput], outputs: Sequence[np.ndarray]) -> list[float]:
        """Return the losses of the gold answers, from the `scoring_outputs` of inputs whose answer is known.

        One for each input or, where an example is written as several inputs, for each example.
        """
        ...

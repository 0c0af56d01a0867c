"""The relaxed Bernoulli (binary concrete) distribution of the routers.

Paper, eqs. 2-5; Maddison et al. (2017).
"""

from __future__ import annotations

import torch
from torch import Tensor


def relaxed_bernoulli(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Sample soft router weights in (0, 1), differentiable in ``logits`` (any shape; same shape back).

    With alpha = sigmoid(w) / (1 - sigmoid(w)) (eq. 5), log(alpha) is w itself, which is how it is computed.
    """
    u = torch.rand(logits.shape, generator=generator, dtype=torch.float64)  # eq. 2
    u = u.clamp(1e-12, 1 - 1e-12)
    noise = (u.log() - (-u).log1p()).to(logits.dtype).to(logits.device)
    v = logits + noise  # eq. 3
    return torch.sigmoid(v / temperature)  # eq. 4


def hard_router(logits: Tensor) -> Tensor:
    """Inference: a module is on where its logit is positive. Bool, same shape."""
    return logits > 0  # section 3.2, after eq. 5


def inference_weights(logits: Tensor, how: str) -> Tensor:
    """Router weights at inference, of the logits' shape and dtype: 0 and 1 (``hard``), or sigmoid(w).

    ``soft`` is the authors' code.
    """
    return hard_router(logits).to(logits.dtype) if how == "hard" else torch.sigmoid(logits)

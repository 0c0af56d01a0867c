"""What a linear probe looks at: the frozen encoder's last hidden states, in the mean over a text's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mp2.backbone import Backbone

TOKENS_AT_ONCE = 8192  # of a batch, padding counted


def pooled_states(
    backbone: Backbone, max_tokens: int
) -> Callable[[Sequence[tuple[str, ...]]], npt.NDArray[np.floating[Any]]]:
    """Return a function from inputs of one or several texts to states float32 [n, H].

    An input is ``[CLS] text [SEP]``, more texts each with a [SEP] of their own, cut to ``max_tokens``; the
    mean is over its tokens, [CLS] and [SEP] included. No prompt is injected. The states of an input are kept:
    the seeds of a series share their test set.
    """
    import torch

    tokenizer, encoder = backbone.tokenizer, backbone.encoder
    device = encoder.word_embeddings.weight.device
    known: dict[tuple[str, ...], npt.NDArray[np.floating[Any]]] = {}

    def ids(texts: tuple[str, ...]) -> list[int]:
        pieces = [tokenizer.encode(text).ids for text in texts]
        made = [tokenizer.cls_id]
        for piece in pieces:
            made += [*piece, tokenizer.sep_id]
        return made[:max_tokens]

    def states(inputs: Sequence[tuple[str, ...]]) -> npt.NDArray[np.floating[Any]]:
        new = {texts: ids(texts) for texts in inputs if texts not in known}
        ordered = sorted(new, key=lambda texts: len(new[texts]), reverse=True)
        while ordered:
            length = len(new[ordered[0]])
            batch = ordered[: max(1, TOKENS_AT_ONCE // length)]
            del ordered[: len(batch)]
            mask = torch.tensor([[i < len(new[t]) for i in range(length)] for t in batch], device=device)
            rows = [new[t] + [tokenizer.pad_id] * (length - len(new[t])) for t in batch]
            with torch.inference_mode():
                hidden = encoder(torch.tensor(rows, device=device), mask)
                mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            known.update(zip(batch, mean.float().cpu().numpy(), strict=True))
        return np.stack([known[texts] for texts in inputs])

    return states

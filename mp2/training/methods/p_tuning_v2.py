"""P-tuning v2: a soft prompt of m rows at every layer and the span head, by Adam.

Liu et al. 2022, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and
Tasks". Their code trains the keys and values of every layer themselves, 2 m H numbers a layer. The MP2 paper
counts 1.2M = 24 x 50 x 1024 for it (Table 3): one soft prompt a layer, which goes through the layer's own key
and value projections. That is what is trained here, so that it is deep MP2's counterpart. The rate 5e-3 and
dropout 0.1 are those of their scripts; theirs falls on keys and values, ours on the soft prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mp2.backbone import Backbone
from mp2.prompts.scratch import hidden_scales
from mp2.training.methods.method import Method


def random_states(backbone: Backbone, m: int, generator: torch.Generator) -> Tensor:
    """Rows [L, m, H] from N(0, s_l), s_l the standard deviation of the states that enter layer l.

    Never zero: equal rows get equal gradients, and would stay equal.
    """
    scales = torch.tensor(hidden_scales(backbone))
    rows = torch.randn(len(scales), m, backbone.config.hidden, generator=generator)
    return rows * scales[:, None, None]


METHOD = Method(name="p-tuning-v2", kind="deep", rows=random_states, rates=(5e-3,), epochs=1000, dropout=0.1)

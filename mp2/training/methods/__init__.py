"""Few-shot methods beside MP2 by gradient (Table 3), a file each; :data:`METHODS` has them by name."""

from __future__ import annotations

from mp2.training.methods import head_tuning, model_tuning, p_tuning_v2, prompt_tuning
from mp2.training.methods.method import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (model_tuning.METHOD, prompt_tuning.METHOD, p_tuning_v2.METHOD, head_tuning.METHOD)
}

__all__ = ["METHODS", "Method"]

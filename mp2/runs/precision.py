"""What a run's precision costs it, measured before it starts: never a low precision without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mp2.engine.agreement import Agreement, agreement

if TYPE_CHECKING:
    from mp2.runs.few_shot_problem import FewShotProblem

_MOST_EXAMPLES, _LEAST_EXAMPLES = 16, 2
_FLOPS = {"cpu": 1e12, "cuda": 1e14}  # of the population in float32: some seconds


def precision_agreement(problem: FewShotProblem) -> Agreement | None:
    """Return how one population of stage II agrees with float32, at the middle layer; None in float32.

    On as many training examples, of all lengths, as take some seconds. Apart from the run: its random
    streams, counts and objective are not touched, and every call finds the same.
    """
    model, config = problem.model, problem.config
    if model.backend.precision == "fp32":
        return None
    space = problem.space
    layer = (space.n_moved or space.n_layers) // 2
    # the losses of other heads are not means over examples that a part of them could stand for
    whole = problem.head.kind != "span"
    chosen = range(len(problem.train_inputs)) if whole else _chosen(problem, layer)
    return agreement(
        model.backend,
        model.prompts,
        [problem.train_inputs[i] for i in chosen],
        layer,
        head=problem.head.head,
        sigma=config.layers.sigma(layer, space.kind),
        n_candidates=config.layers.popsize,
    )


def agreement_line(precision: str, found: Agreement, n_examples: int) -> str:
    """The agreement in words; ``n_examples`` is how many the run trains on."""
    return (
        f"precision {precision}: losses differ by at most {found.max_error:.1e} (spread {found.spread:.1e}), "
        f"rank agreement (Spearman) {found.spearman:.4f} over {found.n_candidates} candidates at layer "
        f"{found.layer} on {found.n_examples} of {n_examples} examples, against fp32"
    )


def _chosen(problem: FewShotProblem, layer: int) -> list[int]:
    """Examples for the comparison, spread evenly over the lengths."""
    config, inputs, meta = problem.model.backbone.config, problem.train_inputs, problem.model.prompts.meta
    n_layers = config.n_layers - layer if meta.injection == "prefix" else config.n_layers
    a_token = 2 * n_layers * (4 * config.hidden**2 + 2 * config.hidden * config.ffn)
    mean = sum(x.n_tokens + meta.n_inline for x in inputs) / len(inputs)
    flops = _FLOPS["cuda" if str(problem.model.backend.device).startswith("cuda") else "cpu"]
    affordable = int(flops / (problem.config.layers.popsize * mean * a_token))
    n = min(len(inputs), _MOST_EXAMPLES, max(_LEAST_EXAMPLES, affordable))
    order = sorted(range(len(inputs)), key=lambda i: (inputs[i].n_tokens, i))
    return [order[(2 * k + 1) * len(order) // (2 * n)] for k in range(n)]

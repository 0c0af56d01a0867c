"""What the methods of Table 3 are tuned with: appendix A, and where the paper says nothing, our sources."""

from __future__ import annotations

import pytest

from mp2.optimizers.config import LayerConfig, SearchConfig
from mp2.optimizers.router_bayes import KAPPA
from mp2.optimizers.router_search import DEFAULT_ITERATIONS
from mp2.runs import BbtConfig
from mp2.training.config import TuneConfig
from mp2.training.methods import METHODS

RUN = BbtConfig(task="chnsent")


def test_black_box_tuning_has_8000_evaluations_in_two_stages() -> None:
    layers = LayerConfig()
    assert (SearchConfig().iters, DEFAULT_ITERATIONS, KAPPA) == (8000, {"shallow": 200, "deep": 100}, 2.0)
    assert [layers.sigma(layer, "deep") for layer in range(3)] == [5e-2, 1e-2, 1e-2]
    assert layers.sigma(0, "shallow") == 0.1
    assert layers.popsize == 20


@pytest.mark.parametrize(("kind", "rates"), [("deep", (3e-3, 2e-5)), ("shallow", (1e-2, 3e-4))])
def test_mp2_by_gradient_has_500_epochs_a_stage(kind: str, rates: tuple[float, float]) -> None:
    config = TuneConfig(run=RUN)
    assert config.rates(kind) == rates  # type: ignore[arg-type]
    assert (config.n_epochs, config.router_epochs) == (1000, None)  # None: half of them


def test_the_baselines_have_their_rates() -> None:
    model = METHODS["model-tuning"]
    assert (min(model.rates), max(model.rates)) == (5e-6, 5e-5)
    assert (model.weight_decay, model.clip, model.trains_backbone) == (0.01, 1.0, True)
    prompt = METHODS["prompt-tuning"]
    assert (prompt.rates, prompt.epochs, prompt.prompt_tokens) == ((5e-3, 1e-2), 1000, 50)
    assert (prompt.weight_decay, prompt.dropout, prompt.continues) == (0.0, 0.0, True)
    v2 = METHODS["p-tuning-v2"]
    assert (v2.rates, v2.dropout, v2.prompt_tokens, v2.kind) == ((5e-3,), 0.1, 50, "deep")

"""Stage II's CMA-ES: the library's own algorithm, seeded by our generator, ahead of time."""

from __future__ import annotations

import cma
import numpy as np
import pytest

from mp2.errors import UsageError
from mp2.optimizers.cma_layers import LayerCma, layer_searches
from mp2.optimizers.config import LayerConfig


def sphere(offsets: np.ndarray) -> np.ndarray:
    return ((offsets - 0.3) ** 2).sum(-1)


def test_populations_are_those_of_the_library_with_the_same_normal_numbers() -> None:
    ours = LayerCma(7, 0.2, LayerConfig(popsize=6), np.random.default_rng(5))
    rng = np.random.default_rng(5)
    options = {"popsize": 6, "seed": np.nan, "verbose": -9, "randn": lambda *s: rng.standard_normal(s)}
    theirs = cma.CMAEvolutionStrategy(7 * [0.0], 0.2, options)
    for _ in range(12):
        population = ours.ask()
        assert np.array_equal(population, np.array(theirs.ask()))
        losses = sphere(population)
        ours.tell(population, losses)
        theirs.tell(list(population), list(losses))


@pytest.mark.parametrize("variant", ["full", "diagonal"])
def test_it_minimises_and_starts_around_zero_with_the_asked_for_step(variant: str) -> None:
    search = LayerCma(40, 0.05, LayerConfig(popsize=20, cma=variant), np.random.default_rng(0))  # type: ignore[arg-type]
    first = search.ask()
    assert first.shape == (20, 40)
    assert abs(first.mean()) < 0.01
    assert 0.03 < first.std() < 0.07
    search.tell(first, sphere(first))
    for _ in range(150):
        population = search.ask()
        search.tell(population, sphere(population))
    assert sphere(population).mean() < 0.5 * sphere(first).mean()


def test_the_smallest_population_goes_on_and_a_smaller_one_is_refused() -> None:
    search = LayerCma(7, 0.2, LayerConfig(popsize=3), np.random.default_rng(5))
    for _ in range(20):
        population = search.ask()
        search.tell(population, sphere(population))
    with pytest.raises(UsageError, match="popsize is 2, expected 3 to 10,000"):
        LayerConfig(popsize=2)


def test_visiting_layers_in_any_order_gives_each_the_same_populations() -> None:
    def visit(order: list[int]) -> dict[int, list[bytes]]:
        searches = layer_searches([0.1, 0.2, 0.3], 5, LayerConfig(popsize=4), np.random.SeedSequence(3))
        seen: dict[int, list[bytes]] = {0: [], 1: [], 2: []}
        for layer in order:
            population = searches[layer].ask()
            seen[layer].append(population.tobytes())
            searches[layer].tell(population, sphere(population))
        return seen

    assert visit([0, 1, 2, 0, 1, 2, 0, 1, 2]) == visit([2, 2, 2, 1, 0, 1, 0, 1, 0])


def test_layers_draw_different_numbers() -> None:
    searches = layer_searches([0.1, 0.1], 5, LayerConfig(popsize=4), np.random.SeedSequence(3))
    assert not np.array_equal(searches[0].ask(), searches[1].ask())


def test_sigmas_are_the_papers() -> None:
    config = LayerConfig()
    assert [config.sigma(layer, "deep") for layer in (0, 1, 23)] == [5e-2, 1e-2, 1e-2]
    assert config.sigma(0, "shallow") == 0.1
    assert config.popsize == 20

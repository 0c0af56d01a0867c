"""Stage-I methods on functions of bits whose optimum is not all ones."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mp2.errors import MissingDependencyError, UnknownNameError, UsageError
from mp2.optimizers.router_model import RouterModel, coordinates, fit_relevance, scaled
from mp2.optimizers.router_search import (
    Routers,
    check_method,
    create_router_search,
    stage_one_iterations,
)


class HiddenBits:
    """Weighted disagreement with a hidden router, with pairwise terms; some upstream routers are near it."""

    def __init__(self, shape: tuple[int, int], seed: int, n_tasks: int = 12, noise: float = 0.25):
        rng = np.random.default_rng(seed)
        self.shape = shape
        tasks = rng.random((n_tasks, *shape)) < 0.5
        self.hidden = tasks[-1] ^ (rng.random(shape) < noise)
        self.warm = tasks
        n_bits = shape[0] * shape[1]
        self.weights = rng.gamma(1.0, 1.0, n_bits)
        self.pairs = rng.normal(size=(n_bits, n_bits)) * (rng.random((n_bits, n_bits)) < 0.05) * 0.2

    def __call__(self, routers: Routers) -> np.ndarray:
        wrong = (routers != self.hidden).reshape(len(routers), -1).astype(float)
        return (wrong @ self.weights + ((wrong @ self.pairs) * wrong).sum(1)) / len(self.weights)


def search(method: str, problem: HiddenBits, iterations: int, seed: int = 0, warm: bool = True) -> np.ndarray:
    """All losses [n] that a method met, the untuned router's first."""
    routers = problem.warm if warm else problem.warm[:0]
    found = create_router_search(method, problem.shape, iterations, routers, np.random.default_rng(seed))
    first = np.ones((1, *problem.shape), dtype=bool)
    losses = [problem(first)]
    found.tell(first, losses[0])
    n = 1
    while n < iterations and len(routers := found.ask(iterations - n)):
        assert routers.dtype == bool
        assert routers.shape[1:] == problem.shape
        assert len(routers) <= iterations - n
        losses.append(problem(routers))
        found.tell(routers, losses[-1])
        n += len(routers)
    return np.concatenate(losses)


CHEAP = ["bits", "random", "nevergrad:DiscreteOnePlusOne", "nevergrad:CMA", "exhaustive"]


@pytest.mark.parametrize("method", CHEAP)
def test_same_generator_same_candidates(method: str) -> None:
    problem = HiddenBits((2, 4), 0)
    runs = [search(method, problem, 40, seed=seed) for seed in (1, 1, 2)]
    assert np.array_equal(runs[0], runs[1])
    if method != "exhaustive":
        assert not np.array_equal(runs[0], runs[2])


def test_bo_is_deterministic_random_first_and_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [search("bo", HiddenBits((1, 4), 0), 23) for _ in range(2)]
    assert np.array_equal(*runs)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("layers", [4, 24])
@pytest.mark.parametrize("warm", [True, False])
def test_ours_beat_random_at_equal_budget(layers: int, warm: bool) -> None:
    ours, random = [], []
    n_problems = 6 if layers == 4 else 3
    for seed in range(n_problems):
        problem = HiddenBits((layers, 8), seed)
        ours.append(search("bits", problem, 100, seed, warm).min())
        random.append(search("random", problem, 100, seed).min())
    assert np.mean(ours) < 0.8 * np.mean(random), (np.mean(ours), np.mean(random))
    assert sum(a < b for a, b in zip(ours, random, strict=True)) >= n_problems - 1


@settings(max_examples=12, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    n_tasks=st.integers(0, 9),
    iterations=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_ours_never_ask_twice_and_end_when_all_are_known(
    shape: tuple[int, int], n_tasks: int, iterations: int, seed: int
) -> None:
    problem = HiddenBits(shape, seed, n_tasks=max(1, n_tasks))
    seen: list[bytes] = []
    inner = problem.__call__
    losses = []

    class Watched(HiddenBits):
        def __init__(self) -> None:
            self.__dict__ = problem.__dict__

        def __call__(self, routers: Routers) -> np.ndarray:
            seen.extend(r.tobytes() for r in routers)
            return inner(routers)

    losses = search("bits", Watched(), iterations, seed, warm=n_tasks > 0)
    assert len(set(seen)) == len(seen) == len(losses) == min(iterations, 2 ** (shape[0] * shape[1]))


def test_ours_go_on_when_losses_are_equal() -> None:
    class Flat(HiddenBits):
        def __call__(self, routers: Routers) -> np.ndarray:
            return np.zeros(len(routers))

    assert len(search("bits", Flat((4, 8), 0), 60)) == 60


def test_exhaustive_finds_the_best_of_all_256() -> None:
    problem = HiddenBits((1, 8), 3)
    losses = search("exhaustive", problem, stage_one_iterations("exhaustive", None, "shallow", (1, 8), 8000))
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    brute = problem(bits.astype(bool).reshape(256, 1, 8))
    assert len(losses) == 256
    assert np.allclose(np.sort(losses), np.sort(brute))


def test_exhaustive_of_a_space_over_the_budget_is_refused() -> None:
    with pytest.raises(UsageError, match=r"needs 2\^192 iterations .* got 8000"):
        stage_one_iterations("exhaustive", None, "deep", (24, 8), 8000)
    with pytest.raises(UsageError, match=r"needs 2\^8 iterations .* got 200"):
        stage_one_iterations("exhaustive", 200, "shallow", (1, 8), 8000)


def test_default_budgets_are_the_papers() -> None:
    assert stage_one_iterations("bo", None, "deep", (24, 8), 8000) == 100
    assert stage_one_iterations("bits", None, "shallow", (1, 8), 8000) == 200
    assert stage_one_iterations("bits", None, "deep", (24, 8), 20) == 20


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'bist'.*Did you mean 'bits'"):
        check_method("bist")
    with pytest.raises(
        UnknownNameError, match=r"nevergrad optimizer 'OnePlusOn'.*Did you mean .*'OnePlusOne'"
    ):
        check_method("nevergrad:OnePlusOn")
    assert check_method("default") == "bits"


@pytest.mark.parametrize(("name", "package"), [("PymooNSGA2", "pymoo"), ("NLOPT_LN_SBPLX", "nlopt")])
def test_an_optimizer_that_imports_late_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # cannot be imported, installed or not
    with pytest.raises(
        MissingDependencyError, match=f"nevergrad's {name} needs the package {package}: pip install {package}"
    ):
        check_method(f"nevergrad:{name}")


def test_the_model_of_bits_finds_what_single_flips_do_not() -> None:
    """Two bits that only help together, beside a base that looks best: a trap for single flips."""

    class Trap(HiddenBits):
        def __call__(self, routers: Routers) -> np.ndarray:
            bits = routers.reshape(len(routers), -1)
            return (
                1.0
                + 0.1 * (bits[:, 2:] != self.hidden.reshape(-1)[2:]).mean(1)
                + 0.2 * (bits[:, 0] != bits[:, 1])
            )

    problem = Trap((2, 4), 3)
    assert search("bits", problem, 60).min() == 1.0


def test_expected_improvement_matches_brute_force() -> None:
    from scipy.stats import norm

    from mp2.optimizers.router_model import _log_improvement

    z = np.array([-30.0, -24.9, -6.0, -1.0, 0.0, 2.0, 9.0])
    direct = np.log(z[2:] * norm.cdf(z[2:]) + norm.pdf(z[2:]))
    assert np.allclose(_log_improvement(z)[2:], direct, rtol=1e-6)
    assert np.allclose(_log_improvement(z)[:2], norm.logpdf(z[:2]) - np.log(z[:2] ** 2), rtol=1e-3)


class FusedPrompt:
    """Loss of the fused prompts of 4 layers: modules are nearly multiples of one vector a layer."""

    shape = (4, 8)

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        along = rng.normal(size=(4, 8, 1)) * rng.normal(size=(4, 1, 6))
        self.modules = along + 0.02 * rng.normal(size=(4, 8, 6))
        self.target = self._fused(rng.random((1, 4, 8)) < 0.5)[0]
        self.steep = np.array([0.1, 1.0, 0.3, 3.0])[:, None]

    def __call__(self, routers: Routers) -> np.ndarray:
        gap = (self._fused(routers) - self.target) * self.steep
        return np.asarray(0.7 + np.tanh((gap**2).sum((1, 2)) / 4))

    def _fused(self, routers: Routers) -> np.ndarray:
        return np.asarray(np.einsum("plk,lkd->pld", routers.astype(float), self.modules) / 2)


def bits_on(problem: FusedPrompt, modules: np.ndarray | None, seed: int) -> float:
    rng = np.random.default_rng(seed)
    no_tasks = np.zeros((0, 4, 8), dtype=bool)
    found = create_router_search("bits", problem.shape, 60, no_tasks, rng, modules)
    routers, losses = np.ones((1, 4, 8), dtype=bool), np.zeros(0)
    while len(losses) < 60:
        new = problem(routers)
        found.tell(routers, new)
        losses = np.append(losses, new)
        routers = found.ask(60 - len(losses))
    return float(losses.min())


def test_bits_do_better_when_they_know_the_modules() -> None:
    problems = [FusedPrompt(seed) for seed in range(5)]
    known = np.mean([bits_on(p, p.modules, i) for i, p in enumerate(problems)]) - 0.7
    unknown = np.mean([bits_on(p, None, i) for i, p in enumerate(problems)]) - 0.7
    assert known < 0.6 * unknown, (known, unknown)


def random_model(n: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, RouterModel]:
    """Routers [n, 6], losses, modules [2, 3, 4], relevance [2] and their model."""
    rng = np.random.default_rng(0)
    routers, losses, modules = rng.random((n, 6)) < 0.5, rng.normal(size=n), rng.normal(size=(2, 3, 4))
    s = np.exp([-0.5, -2.0])
    return routers, losses, modules, s, RouterModel(routers, losses, scaled(coordinates(modules), s))


def covariance(a: np.ndarray, b: np.ndarray, modules: np.ndarray, s: np.ndarray) -> float:
    """exp(-sum of s_l times squared distance) of two routers [6], straight from the fused prompts."""
    total = 0.0
    for layer, (z, s_l) in enumerate(zip(modules, s, strict=True)):
        differ = a.reshape(2, 3)[layer].astype(float) - b.reshape(2, 3)[layer]
        unit = (z**2).sum() / len(z)
        total += s_l * (0.95 * ((differ @ z) ** 2).sum() / unit + 0.05 * np.abs(differ).sum())
    return float(np.exp(-total))


def test_worth_matches_a_gaussian_process_written_out() -> None:
    from scipy.stats import norm

    routers, losses, modules, s, model = random_model()
    x = np.random.default_rng(1).random(6) < 0.5
    kernel = np.array([[covariance(a, b, modules, s) for b in routers] for a in routers])
    kernel += 1e-3 * np.eye(len(kernel))
    near = np.array([covariance(x, b, modules, s) for b in routers])
    mean = near @ np.linalg.solve(kernel, losses)
    scale = losses @ np.linalg.solve(kernel, losses) / len(losses)
    deviation = np.sqrt(scale * (1 - near @ np.linalg.solve(kernel, near)))
    z = (losses.min() - mean) / deviation
    assert np.isclose(model.worth(x[None])[0], np.log(deviation * (z * norm.cdf(z) + norm.pdf(z))))


def test_worth_of_flips_is_the_worth_of_the_neighbours() -> None:
    *_, model = random_model()
    x = np.random.default_rng(1).random(6) < 0.5
    assert np.allclose(model.worth_of_flips(x), model.worth(x ^ np.eye(6, dtype=bool)))


def test_a_model_that_is_told_what_it_expects_expects_the_same() -> None:
    routers, _, modules, s, model = random_model()
    x = np.random.default_rng(1).random(6) < 0.5
    more = model.with_expected(x)
    assert len(more._losses) == len(routers) + 1
    expected = np.array([covariance(x, b, modules, s) for b in routers]) @ model._weights
    assert np.isclose(more._losses[-1], expected)
    assert more.worth(x[None])[0] < model.worth(x[None])[0]


def test_the_relevant_layer_is_found() -> None:
    rng = np.random.default_rng(0)
    points = (rng.random((40, 3, 8)) < 0.5).astype(float)
    losses = np.sin(points[:, 1] @ rng.normal(size=8))
    found = fit_relevance(points, (losses - losses.mean()) / losses.std(), None, 30)
    assert found[2] > max(found[1], found[3]) + 1  # found[0] is of all


def test_relevance_climbs_the_likelihood_by_its_gradient() -> None:
    """No step of a finite-difference search around the optimum is better."""
    from scipy.stats import multivariate_normal

    rng = np.random.default_rng(3)
    points, losses = (rng.random((15, 2, 4)) < 0.5).astype(float), rng.normal(size=15)

    def posterior(fitted: np.ndarray) -> float:
        gaps = ((points[:, None] - points[None]) ** 2).sum(-1)
        s = 2 / 8 * np.exp(fitted[0] + fitted[1:])
        kernel = np.exp(-(gaps * s).sum(-1)) + 1e-3 * np.eye(15)
        variance = losses @ np.linalg.solve(kernel, losses) / 15
        prior = (fitted[0] ** 2 / 3**2 + (fitted[1:] ** 2).sum() / 1.5**2) / 2
        return float(multivariate_normal.logpdf(losses, cov=variance * kernel) - prior)

    found = fit_relevance(points, losses, None, 100)
    for step in (*np.eye(3), *-np.eye(3)):
        assert posterior(found) > posterior(found + 0.2 * step)


@pytest.mark.parametrize("name", ["DiscreteOnePlusOne", "NGOpt", "CMA"])
def test_nevergrad_never_asks_for_a_router_twice_until_all_are_known(name: str) -> None:
    """Many points of its box are one router: only new ones are evaluated, and so counted."""
    problem = HiddenBits((1, 5), 3)
    suggest = create_router_search(
        f"nevergrad:{name}", (1, 5), 40, np.zeros((0, 1, 5), bool), np.random.default_rng(0)
    )
    untuned = np.ones((1, 1, 5), bool)
    suggest.tell(untuned, problem(untuned))
    seen = {untuned.tobytes()}
    while len(routers := suggest.ask(1)):
        assert routers.tobytes() not in seen
        seen.add(routers.tobytes())
        suggest.tell(routers, problem(routers))
    assert len(seen) == 32

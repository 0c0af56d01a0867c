from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mp2.backbone import Backbone
from mp2.engine import Objective, create_backend
from mp2.engine.cpu import native
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cpu.int8_runtime import Int8Backend
from mp2.engine.cpu.int8_steps import (
    Difference,
    Int8Linear,
    NativeSteps,
    Product,
    TorchSteps,
    int8_problem,
    make_steps,
)
from mp2.errors import UsageError
from mp2.prompts import PromptSet
from mp2.tasks import MrcInput

from ..slow_reference import D, SlowReference

P, R = 4, 6
needs_products = pytest.mark.skipif(bool(int8_problem()), reason=int8_problem())
needs_compiler = pytest.mark.skipif(native.load() is None, reason="no C compiler here")


def near(prompts: PromptSet, n: int, spread: float) -> np.ndarray:
    """n candidates around one prompt that matters."""
    rng = np.random.default_rng(3)
    shape = (prompts.z.shape[0], D)
    return (4 * rng.standard_normal(shape) + spread * rng.standard_normal((n, *shape))).astype(np.float32)


@pytest.fixture(params=["C", "torch"])
def int8(request: pytest.FixtureRequest, tiny_backbone: Backbone) -> Int8Backend:
    if problem := int8_problem():
        pytest.skip(problem)
    runtime = Int8Backend(tiny_backbone)
    if request.param == "C" and not isinstance(runtime.steps, NativeSteps):
        pytest.skip("no C compiler here")
    if request.param == "torch":
        runtime.steps = TorchSteps()
    return runtime


def product(width: int, rng: torch.Generator) -> Product:
    difference = TorchSteps().difference(torch.randn(1 + P, R, 20, generator=rng))
    return Int8Linear(torch.randn(width, 20, generator=rng))(difference)


@needs_compiler
@pytest.mark.parametrize("width", [5, 16, 70])
def test_steps_in_c_equal_those_in_torch(width: int) -> None:
    rng = torch.Generator().manual_seed(0)
    plain, fast = TorchSteps(), make_steps()
    assert isinstance(fast, NativeSteps)

    def check(one: Difference | None, two: Difference | None) -> None:
        assert one is not None
        assert two is not None
        torch.testing.assert_close(one.scale, two.scale, rtol=1e-4, atol=1e-7)
        step = one.q.int() - two.q.int()
        assert int(step.abs().max()) <= 1  # a half rounded the other way
        assert float((step != 0).float().mean()) < 0.01

    x = torch.randn(1 + P, R, width, generator=rng)
    check(plain.difference(x), fast.difference(x))
    y = product(width, rng)
    outs = [x.clone(), x.clone()]
    for steps, out in zip((plain, fast), outs, strict=True):
        steps.add(y, out)
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    reference, active = torch.randn(2, R, width, generator=rng)
    norm = torch.randn(width, generator=rng), torch.randn(width, generator=rng)
    for residual in (x, x[:1].contiguous()):
        outs = [x.clone(), x.clone()]
        check(
            *(
                steps.add_norm(y, reference, residual, norm, 1e-12, out, difference=True)
                for steps, out in zip((plain, fast), outs, strict=True)
            )
        )
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    for activation in ("gelu", "gelu_tanh", "relu"):
        check(
            *(steps.add_activate(y, 3 * reference, active, activation) for steps in (plain, fast)),
        )


@needs_products
def test_products_of_differences_are_near_the_exact_ones() -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1 + P, R, 64, generator=rng), torch.randn(40, 64, generator=rng)
    got = Int8Linear(weight)(TorchSteps().difference(x)).dense(R)
    expected = (x[1:] - x[0]) @ weight.T
    assert float((got - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_errors_are_a_small_share_of_the_spread_and_ranks_agree(
    tiny_backbone: Backbone,
    deep: PromptSet,
    slow_deep: SlowReference,
    train: list[MrcInput],
    int8: Int8Backend,
    spread: float,
) -> None:
    z = near(deep, 12, spread)
    objective = Objective(int8.forward(deep, micro_batch_tokens=300), train)
    exact = slow_deep.losses(z, train)
    check_close(objective.full_losses(z).fetch(), exact)
    objective.set_incumbent(z[0])
    for layer in (2, 0, 1):
        whole = np.repeat(z[:1], len(z), 0)
        whole[:, layer] = z[:, layer]
        check_close(objective.layer_losses(layer, z[:, layer]).fetch(), slow_deep.losses(whole, train))


def check_close(got: np.ndarray, exact: np.ndarray) -> None:
    assert np.abs(got - exact).max() < 0.03 * np.ptp(exact)
    ranks = np.corrcoef(got.argsort().argsort(), exact.argsort().argsort())[0, 1]
    assert ranks > 0.97


def test_shallow_prompts_too(
    tiny_backbone: Backbone,
    shallow: PromptSet,
    slow_shallow: SlowReference,
    train: list[MrcInput],
    int8: Int8Backend,
) -> None:
    z = near(shallow, 8, 0.1)
    objective = Objective(int8.forward(shallow), train)
    check_close(objective.full_losses(z).fetch(), slow_shallow.losses(z, train))


def test_one_candidate_and_a_population_without_spread_are_exact(
    tiny_backbone: Backbone, deep: PromptSet, train: list[MrcInput], int8: Int8Backend
) -> None:
    z = near(deep, 1, 0.0)
    # the same micro-batches: bits of float32 products may differ with the number of their rows
    plain = Objective(CpuBackend(tiny_backbone).forward(deep, micro_batch_tokens=300), train)
    exact = plain.full_losses(z).fetch()
    objective = Objective(int8.forward(deep, micro_batch_tokens=300), train)
    np.testing.assert_array_equal(objective.full_losses(z).fetch(), exact)
    np.testing.assert_allclose(objective.full_losses(np.repeat(z, 5, 0)).fetch(), exact.repeat(5), rtol=1e-6)


def test_a_candidate_that_is_not_finite_spoils_no_other(
    tiny_backbone: Backbone,
    deep: PromptSet,
    slow_deep: SlowReference,
    train: list[MrcInput],
    int8: Int8Backend,
) -> None:
    """The others keep int8's usual error: their reference is the mean of those that are finite."""
    z = near(deep, 8, 0.1)
    good = [0, *range(2, 8)]
    exact = slow_deep.losses(z[good], train)
    objective = Objective(int8.forward(deep), train)
    for bad in (np.nan, np.inf):
        z[1, 1, 0] = bad
        losses = objective.full_losses(z).fetch()
        assert not np.isfinite(losses[1])
        check_close(losses[good], exact)
    objective.set_incumbent(z[0])
    assert not np.isfinite(objective.layer_losses(1, z[:, 1]).fetch()[1])


@pytest.fixture
def fresh() -> Iterator[None]:
    int8_problem.cache_clear()
    yield
    int8_problem.cache_clear()


def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply as AVX2 does: ``a`` shifted to be unsigned, sums of two products saturating in 16 bits."""
    products = (a.int() + 128).unsqueeze(2) * b.int()  # [rows, inner, columns]
    pairs = (products[:, ::2] + products[:, 1::2]).clamp(-(2**15), 2**15 - 1)
    return pairs.sum(1, dtype=torch.int32) - 128 * b.int().sum(0)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("products", "why"), [(None, "no int8 matrix product"), (saturating, "saturate .*no VNNI or AMX")]
)
def test_without_exact_int8_products_it_is_refused(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, products: object, why: str
) -> None:
    monkeypatch.setattr(torch, "_int_mm", products)
    with pytest.raises(UsageError, match=rf"^precision int8: [^\n]*{why}[^\n]*; use --precision fp32$"):
        Int8Backend(tiny_backbone)


@pytest.mark.usefixtures("fresh")
def test_exact_int8_products_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())
    assert int8_problem() == ""


@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported() and not torch.cpu._is_avx2_supported(), reason="not an x86 processor"
)
@pytest.mark.parametrize("level", ["AVX2", "AVX512_CORE"])
def test_a_processor_without_vnni_is_told_apart(level: str) -> None:
    code = "from mp2.engine.cpu.int8_steps import int8_problem; print(int8_problem())"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": level},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "saturate" in told.stdout


@needs_products
def test_int8_is_had_by_name_on_the_cpu_only(tiny_backbone: Backbone) -> None:
    runtime = create_backend("torch", tiny_backbone, precision="int8")
    assert isinstance(runtime, Int8Backend)
    assert runtime.precision == "int8"

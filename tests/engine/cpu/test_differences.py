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
from mp2.engine.cpu.difference_steps import (
    Difference,
    NativeSteps,
    Product,
    TorchSteps,
    bf16_unfit,
    int8_unfit,
    make_linear,
    make_steps,
)
from mp2.engine.cpu.differences import DifferenceBackend
from mp2.errors import UsageError
from mp2.prompts import PromptSet
from mp2.tasks import MrcInput

from ..slow_reference import D, SlowReference

P, R = 4, 6
# Of a loss, as a share of its population's spread. bfloat16 rounds difference, weight and product by at most
# 2^-9 each, in 4 products of 3 layers: independent errors add up to sqrt(36) * 2^-9.
ERROR = {"bf16": 6 * 2**-9, "int8": 0.03}
needs_compiler = pytest.mark.skipif(native.load() is None, reason="no C compiler here")


def near(prompts: PromptSet, n: int, spread: float) -> np.ndarray:
    """n candidates around one prompt that matters."""
    rng = np.random.default_rng(3)
    shape = (prompts.z.shape[0], D)
    return (4 * rng.standard_normal(shape) + spread * rng.standard_normal((n, *shape))).astype(np.float32)


@pytest.fixture(params=["bf16", "int8"])
def precision(request: pytest.FixtureRequest) -> str:
    if request.param == "int8" and (unfit := int8_unfit()):
        pytest.skip(unfit)
    return str(request.param)


@pytest.fixture(params=["C", "torch"])
def rough(request: pytest.FixtureRequest, tiny_backbone: Backbone, precision: str) -> DifferenceBackend:
    runtime = DifferenceBackend(tiny_backbone, precision=precision)
    if request.param == "C" and not isinstance(runtime.steps, NativeSteps):
        pytest.skip("no C compiler here")
    if request.param == "torch":
        runtime.steps = TorchSteps(precision)
    return runtime


def product(precision: str, width: int, rng: torch.Generator) -> Product:
    difference = TorchSteps(precision).difference(torch.randn(1 + P, R, 20, generator=rng))
    return make_linear(precision, torch.randn(width, 20, generator=rng))(difference)


@needs_compiler
@pytest.mark.parametrize("width", [5, 16, 70])
def test_steps_in_c_equal_those_in_torch(precision: str, width: int) -> None:
    rng = torch.Generator().manual_seed(0)
    plain, fast = TorchSteps(precision), make_steps(precision)
    assert isinstance(fast, NativeSteps)

    def check(one: Difference | None, two: Difference | None) -> None:
        assert one is not None
        assert two is not None
        torch.testing.assert_close(one.scale, two.scale, rtol=1e-4, atol=1e-7)
        # integers, or bfloat16 whose neighbours are neighbours as integers: a half rounded the other way
        whole = (x.q.int() if precision == "int8" else x.q.view(torch.int16).int() for x in (one, two))
        step = next(whole) - next(whole)
        near_zero = torch.zeros_like(step, dtype=torch.bool)
        if precision == "bf16":  # of a difference that float32's own rounding made, the sign is chance
            near_zero = (one.q.float().abs() < 1e-5) & (two.q.float().abs() < 1e-5)
        assert int(step[~near_zero].abs().max()) <= 1
        assert float((step[~near_zero] != 0).float().mean()) < 0.01

    x = torch.randn(1 + P, R, width, generator=rng)
    check(plain.difference(x), fast.difference(x))
    y = product(precision, width, rng)
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


def test_products_of_differences_are_near_the_exact_ones(precision: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1 + P, R, 64, generator=rng), torch.randn(40, 64, generator=rng)
    got = make_linear(precision, weight)(TorchSteps(precision).difference(x)).dense(R)
    expected = (x[1:] - x[0]) @ weight.T
    # bfloat16 has 8 bits: differences, weights and products are rounded by at most 2^-9 each
    bound = {"bf16": 3 * 2**-9, "int8": 0.02}[precision]
    assert float((got - expected).norm() / expected.norm()) < bound


def test_c_rounds_to_bfloat16_as_torch_does() -> None:
    steps = make_steps("bf16")
    if not isinstance(steps, NativeSteps):
        pytest.skip("no C compiler here")
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.3e38, 1e-40, 0.0, np.inf, -np.inf, np.nan])
    x = torch.stack([torch.zeros(1, 9), halves.unsqueeze(0)])
    got = steps.difference(x).q[0].float()
    torch.testing.assert_close(got, halves.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_errors_are_a_small_share_of_the_spread_and_ranks_agree(
    tiny_backbone: Backbone,
    deep: PromptSet,
    slow_deep: SlowReference,
    train: list[MrcInput],
    rough: DifferenceBackend,
    spread: float,
) -> None:
    z = near(deep, 12, spread)
    objective = Objective(rough.forward(deep, micro_batch_tokens=300), train)
    exact = slow_deep.losses(z, train)
    check_close(rough, objective.full_losses(z).fetch(), exact)
    objective.set_incumbent(z[0])
    for layer in (2, 0, 1):
        whole = np.repeat(z[:1], len(z), 0)
        whole[:, layer] = z[:, layer]
        got = objective.layer_losses(layer, z[:, layer]).fetch()
        check_close(rough, got, slow_deep.losses(whole, train))


def check_close(rough: DifferenceBackend, got: np.ndarray, exact: np.ndarray) -> None:
    assert np.abs(got - exact).max() < ERROR[rough.precision] * np.ptp(exact)
    ranks = np.corrcoef(got.argsort().argsort(), exact.argsort().argsort())[0, 1]
    assert ranks > 0.97


def test_shallow_prompts_too(
    tiny_backbone: Backbone,
    shallow: PromptSet,
    slow_shallow: SlowReference,
    train: list[MrcInput],
    rough: DifferenceBackend,
) -> None:
    z = near(shallow, 8, 0.1)
    objective = Objective(rough.forward(shallow), train)
    check_close(rough, objective.full_losses(z).fetch(), slow_shallow.losses(z, train))


def test_one_candidate_and_a_population_without_spread_are_exact(
    tiny_backbone: Backbone, deep: PromptSet, train: list[MrcInput], rough: DifferenceBackend
) -> None:
    z = near(deep, 1, 0.0)
    # the same micro-batches: bits of float32 products may differ with the number of their rows
    plain = Objective(CpuBackend(tiny_backbone).forward(deep, micro_batch_tokens=300), train)
    exact = plain.full_losses(z).fetch()
    objective = Objective(rough.forward(deep, micro_batch_tokens=300), train)
    np.testing.assert_array_equal(objective.full_losses(z).fetch(), exact)
    np.testing.assert_allclose(objective.full_losses(np.repeat(z, 5, 0)).fetch(), exact.repeat(5), rtol=1e-6)


def test_a_candidate_that_is_not_finite_spoils_no_other(
    tiny_backbone: Backbone,
    deep: PromptSet,
    slow_deep: SlowReference,
    train: list[MrcInput],
    rough: DifferenceBackend,
) -> None:
    """The others keep their usual error: their reference is the mean of those that are finite."""
    z = near(deep, 8, 0.1)
    good = [0, *range(2, 8)]
    exact = slow_deep.losses(z[good], train)
    objective = Objective(rough.forward(deep), train)
    for bad in (np.nan, np.inf):
        z[1, 1, 0] = bad
        losses = objective.full_losses(z).fetch()
        assert not np.isfinite(losses[1])
        check_close(rough, losses[good], exact)
    objective.set_incumbent(z[0])
    assert not np.isfinite(objective.layer_losses(1, z[:, 1]).fetch()[1])


@pytest.fixture
def fresh() -> Iterator[None]:
    int8_unfit.cache_clear()
    yield
    int8_unfit.cache_clear()


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
        DifferenceBackend(tiny_backbone, precision="int8")


@pytest.mark.usefixtures("fresh")
def test_exact_int8_products_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())
    assert int8_unfit() == ""


@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported() and not torch.cpu._is_avx2_supported(), reason="not an x86 processor"
)
@pytest.mark.parametrize("level", ["AVX2", "AVX512_CORE"])
def test_a_processor_without_vnni_is_told_apart(level: str) -> None:
    code = "from mp2.engine.cpu.difference_steps import int8_unfit; print(int8_unfit())"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": level},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "saturate" in told.stdout


def test_both_are_had_by_name_on_the_cpu(tiny_backbone: Backbone, precision: str) -> None:
    runtime = create_backend("torch", tiny_backbone, precision=precision)
    assert isinstance(runtime, DifferenceBackend)
    assert runtime.precision == precision


def test_slow_bfloat16_products_are_said(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert bf16_unfit()
    assert bf16_unfit() in DifferenceBackend(tiny_backbone, precision="bf16").reason

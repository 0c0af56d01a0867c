"""The Triton kernels against the plain way: compiled on a GPU, elsewhere in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mp2.backbone import Backbone
from mp2.backbone.encoder import activate
from mp2.engine import Objective
from mp2.engine.cuda import steps as steps_module
from mp2.engine.cuda.attention import PlainKernels, attend
from mp2.engine.cuda.backend import CudaBackend
from mp2.engine.cuda.linear import FP8, FP8_MAX, add_norm, quantize_rows
from mp2.engine.cuda.pack import Spans
from mp2.engine.cuda.steps import EagerSteps, TritonSteps, choose_steps
from mp2.errors import MissingDependencyError
from mp2.prompts import PromptSet

from ..slow_reference import SlowReference, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
HALVES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    pytest.importorskip("triton", reason="triton is not here; CPU builds of torch do not bring it")
    from mp2.engine.cuda import triton_steps

    if INTERPRETED and type(triton_steps._add_norm).__name__ != "InterpretedFunction":
        pytest.skip(f"triton was imported without TRITON_INTERPRET, now {os.environ['TRITON_INTERPRET']}")
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            teach_interpreter(patch)
        yield triton_steps


def teach_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Have Triton's interpreter (3.6 to 3.9) do what it does not do right, with torch.

    numpy has no bfloat16, whose bits it multiplies as integers, and its conversion to e4m3 loses carries.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    types = {
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: FP8,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
    }

    def convert(data: np.ndarray, before: Any, after: Any, rounding: Any) -> np.ndarray:
        sizes = [np.dtype(f"u{kind.primitive_bitwidth // 8}") for kind in (before, after)]
        bits = torch.from_numpy(np.frombuffer(data.tobytes(), sizes[0]).copy())
        made = bits.view(types[before]).to(types[after]).view(getattr(torch, sizes[1].name))
        return made.numpy().reshape(data.shape)

    real = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [
            interpreter.TensorHandle(
                convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32
            )
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        ]
        return real(self, *wide, *rest)

    patch.setattr(interpreter, "_convert_float", convert)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def near(dtype: torch.dtype) -> dict[str, float]:
    eps = torch.finfo(dtype).eps
    return {"rtol": 4 * eps, "atol": 8 * eps}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "residual_rows", "width"), [((3, 5), (1, 5), 40), ((7,), (7,), 128)])
def test_add_norm_is_the_plain_one_and_a_shared_residual_is_read_by_all(
    kernels: ModuleType,
    rows: tuple[int, ...],
    residual_rows: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
) -> None:
    rng = torch.Generator().manual_seed(0)
    x, residual = (
        (4 * torch.randn(*shape, width, generator=rng)).to(DEVICE, dtype) for shape in (rows, residual_rows)
    )
    weight, bias = torch.randn(2, width, generator=rng).to(DEVICE)
    got = kernels.add_norm(x, residual, weight, bias, 1e-5)
    assert (got.shape, got.dtype) == (x.shape, dtype)
    exact = torch.nn.functional.layer_norm(
        x.double() + residual.double(), (width,), weight.double(), bias.double(), 1e-5
    )
    torch.testing.assert_close(got.double(), exact, **near(dtype))
    torch.testing.assert_close(got, add_norm(x, residual, weight, bias, 1e-5), **near(dtype))


def test_sums_that_half_precision_cannot_hold_are_normed(kernels: ModuleType) -> None:
    x = torch.full((2, 8), 6e4, dtype=torch.float16, device=DEVICE)
    x[:, ::2] = -6e4
    ones, zeros = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    got = kernels.add_norm(x, x, ones, zeros, 1e-12)
    torch.testing.assert_close(got.float().abs(), torch.ones(2, 8, device=DEVICE), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of a sigmoid that is 0
@pytest.mark.parametrize("activation", ["", "gelu", "gelu_tanh", "relu"])
def test_rows_are_quantised_as_the_plain_way_does_after_the_activation(
    kernels: ModuleType, activation: str
) -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[2] = 0
    x[3] *= 1e4
    rows, scales = kernels.quantize(x, activation)
    wide = activate(activation, x) if activation else x
    expected, expected_scales = quantize_rows(wide)
    torch.testing.assert_close(scales, expected_scales)
    assert rows.dtype == FP8
    assert float(rows.float().abs().max()) == FP8_MAX
    torch.testing.assert_close(rows.float(), expected.float(), rtol=0.13, atol=0.02)
    assert float((rows.float() == expected.float()).float().mean()) > 0.95  # a quotient may lie between two


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("b", "c", "m", "lengths", "size"),
    [
        (1, 1, 0, (3, 1, 130), 24),
        (2, 2, 3, (3, 1, 130), 24),
        (2, 1, 70, (3, 1, 130), 24),
        (1, 2, 70, (3, 1, 130), 24),
        (2, 2, 50, (3, 64, 65, 200), 64),
    ],
)
def test_one_softmax_over_prefix_and_text_of_any_length(
    kernels: ModuleType, b: int, c: int, m: int, lengths: tuple[int, ...], size: int, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(0)
    spans = Spans(np.array(lengths), b, DEVICE)
    qkv = torch.randn(b, sum(lengths), 3, 2, size, generator=rng).to(DEVICE, dtype)
    keys, values = torch.randn(2, c, 2, m, size, generator=rng).to(DEVICE, dtype)
    got = kernels.attend(qkv, spans, (keys, values))
    exact = attend(PlainKernels(), qkv.double(), spans, (keys.double(), values.double()))
    assert (got.shape, got.dtype) == (exact.shape, dtype)
    torch.testing.assert_close(got.double(), exact, **near(dtype))


def test_losses_through_the_kernels_equal_slow_float64(
    kernels: ModuleType, tiny_backbone: Backbone, deep: PromptSet, slow_deep: SlowReference
) -> None:
    backend = CudaBackend(tiny_backbone, device=DEVICE, precision="fp32", one_kernel=True)
    backend.steps = TritonSteps()
    assert backend.notes.startswith("attention in one kernel; steps ")
    inputs = make_inputs((3, 9), tiny_backbone.config.vocab_size)
    objective = Objective(backend.forward(deep), inputs)
    z = 4 * np.random.default_rng(3).standard_normal((2, *deep.z.shape[::2])).astype(np.float32)
    np.testing.assert_allclose(objective.full_losses(z).fetch(), slow_deep.losses(z, inputs), rtol=1e-5)
    objective.set_incumbent(z[0])
    whole = np.repeat(z[:1], 2, 0)
    whole[:, 1] = z[:, 1]
    got = objective.layer_losses(1, z[:, 1]).fetch()
    np.testing.assert_allclose(got, slow_deep.losses(whole, inputs), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability: int, tmp_path: Path) -> None:
    """With Triton's own assembler; Ampere has no e4m3. The interpreter must be off: a process of its own."""
    pytest.importorskip("triton", reason="triton is not here; CPU builds of torch do not bring it")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [f"add_norm {own} wide loads" for own in ("fp16", "bf16", "fp32")]
    lines += [f"attend {own} on tensor cores, wide loads" for own in ("fp16", "bf16")]
    if capability == 90:
        lines += [f"quantize {name} e4m3x2 wide loads" for name in ("as it is", "gelu", "gelu_tanh", "relu")]
    assert done.stdout.splitlines() == lines


class _Wrong(EagerSteps):
    name = "wrong"

    def add_norm(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:  # type: ignore[override]
        return add_norm(x, *rest) * 1.02


@pytest.mark.parametrize(
    ("made", "why"),
    [(ImportError("No module named 'triton'"), "No module named 'triton'"), (_Wrong, "not close")],
)
def test_steps_that_are_missing_or_wrong_give_way_to_eager_ones_and_a_reason(
    monkeypatch: pytest.MonkeyPatch, made: Any, why: str
) -> None:
    def make() -> Any:
        if isinstance(made, Exception):
            raise made
        return made()

    monkeypatch.setattr(steps_module, "TritonSteps", make)
    real, cpu = torch.Tensor.to, torch.device("cpu")
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, *dtype: real(x, cpu, *dtype))  # no GPU here
    steps, reason = choose_steps(torch.device("cuda"), torch.float16, 40, fp8=False)
    assert steps.name == "eager"
    assert why in reason
    assert "\n" not in reason


def test_right_steps_are_taken_and_no_triton_is_tried_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "TritonSteps", EagerSteps)
    for dtype in HALVES:
        steps_module._check(EagerSteps(), torch.device("cpu"), dtype, 40, fp8=True)
    with pytest.raises(AssertionError, match="not close"):
        steps_module._check(_Wrong(), torch.device("cpu"), torch.float32, 40, fp8=False)
    monkeypatch.delattr(steps_module, "TritonSteps")
    assert choose_steps(torch.device("cpu"), torch.float32, 40, fp8=False)[1] == ""


def test_a_flag_that_needs_triton_says_so(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "mp2.engine.cuda" and "triton_steps" in (args[2] if len(args) > 2 else ()):
            raise ImportError("No module named 'triton'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match="need triton"):
        CudaBackend(tiny_backbone, device="cpu", precision="fp32", one_kernel=True)

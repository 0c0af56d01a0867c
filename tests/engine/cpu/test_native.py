from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import erf

from mp2.engine.cpu import attention, native
from mp2.engine.cpu.native.interface import FUNCTIONS, MAX_HEAD, MAX_ROW, Half

P, N, T = 3, 2, 11


needs_compiler = pytest.mark.skipif(native.load() is None, reason="no C compiler here")


@needs_compiler
@pytest.mark.parametrize(("h", "d", "m"), [(4, 6, 5), (2, 32, 50), (1, 64, 0), (3, 16, 33), (2, 128, 7)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (P, 1), (1, N), (P, N)])
def test_compiled_attention_equals_torch(
    h: int, d: int, m: int, padded: bool, shape: tuple[int, int]
) -> None:
    rng = torch.Generator().manual_seed(0)
    qkv = torch.randn(P, N, T, 3, h, d, generator=rng)
    prefix = tuple(torch.randn(2, *shape, h, m, d, generator=rng))
    mask = torch.arange(T)[None] < torch.tensor([[T], [T - 4]]) if padded else None
    wide = qkv.double(), (prefix[0].double(), prefix[1].double())  # float64 takes torch's operators
    for got, expected in (
        (attention.attend(qkv, mask, (prefix[0], prefix[1])), attention.attend(wide[0], mask, wide[1])),
        (attention.attend(qkv, mask, None), attention.attend(wide[0], mask, None)),
        (
            attention.attend_shared_text(qkv[0], mask, (prefix[0], prefix[1])),
            attention.attend_shared_text(wide[0][0], mask, wide[1]),
        ),
    ):
        torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_compiled_attention_survives_large_scores_and_keeps_nan() -> None:
    rng = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 1, T, 3, 2, 32, generator=rng)
    qkv[0, :, :, 0] *= 1e4
    prefix = torch.randn(2, 2, 1, 2, 5, 32, generator=rng)
    expected = attention.attend(qkv.double(), None, (prefix[0].double(), prefix[1].double()))
    torch.testing.assert_close(
        attention.attend(qkv, None, (prefix[0], prefix[1])), expected.float(), rtol=1e-4, atol=1e-4
    )
    prefix[0, 1, 0, 0, 3, 1] = float("nan")
    got = attention.attend(qkv, None, (prefix[0], prefix[1]))
    assert got[1, :, :, 0].isnan().all()
    assert got[0].isfinite().all()
    assert got[1, :, :, 1].isfinite().all()


@needs_compiler
def test_heads_that_the_kernel_does_not_hold_take_torchs_way() -> None:
    rng = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 1, T, 3, 2, MAX_HEAD + 1, generator=rng)
    expected = attention.attend(qkv.double(), None, None)
    torch.testing.assert_close(attention.attend(qkv, None, None), expected.float(), rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "size"),
    [("mp2_attend", MAX_HEAD + 1), ("mp2_attend", 0), ("mp2_int8_difference", MAX_ROW + 1)],
)
def test_c_refuses_sizes_beyond_its_stack(name: str, size: int) -> None:
    library = native.load()
    assert library is not None
    if name == "mp2_attend":
        arguments = [None, 1, None, None, 1, 1, *[None] * 5, 1, 1, 1, 1, size, 0, 1]
    else:
        arguments = [None, None, None, 1, 1, size, 1]
    with pytest.raises(ValueError, match=f"{name}: sizes"):
        getattr(library, name)(*arguments)


def test_every_c_function_is_declared_with_its_own_types() -> None:
    kinds = {"long": ctypes.c_long, "int": ctypes.c_int, "float": ctypes.c_float}
    found = {}
    folder = Path(native.__file__).parent
    sources = [path.read_text("utf-8") for path in folder.glob("*.c")]
    passes = (folder / "difference_passes.h").read_text("utf-8")  # included once for each type
    for precision in ("bf16", "int8"):
        sources.append(re.sub(r"PASS\((\w+)\)", rf"mp2_{precision}_\1", passes))
    for source in sources:
        for name, arguments in re.findall(r"^int (mp2_\w+)\(([^)]*)\) \{", source, re.MULTILINE):
            found[name] = tuple(
                ctypes.c_void_p if "*" in argument else kinds[argument.split()[0]]
                for argument in arguments.split(",")
                if argument != "void"
            )
    half = ctypes.POINTER(Half)
    declared = {
        name: tuple(ctypes.c_void_p if kind is half else kind for kind in types)
        for name, types in FUNCTIONS.items()
    }
    assert declared == found


def test_the_struct_has_the_fields_of_the_c_file() -> None:
    source = (Path(native.__file__).parent / "dense.c").read_text("utf-8")
    body = re.search(r"struct half \{[^\n]*\n(.*?)\};", source, re.DOTALL)
    assert body is not None
    assert re.findall(r"\*(\w+)", body[1]) == [name for name, *_ in Half._fields_]


@needs_compiler
def test_exponential_and_gelu_are_as_exact_as_their_comments_say(tmp_path: Path) -> None:
    names = ("exp_negative", "gelu_erf", "gelu_tanh")
    loop = (
        "void {0}_all(const float *x, float *y, long n, float by)"
        " {{ for (long i = 0; i < n; i++) y[i] = {0}(x[i] - by); }}"
    )
    source, library = tmp_path / "all.c", tmp_path / "all.so"
    source.write_text("\n".join(['#include "vector_math.h"', *(loop.format(name) for name in names)]))
    include = f"-I{Path(native.__file__).parent}"
    command = [*native.compiler(), *native.FLAGS, include, str(source), "-o", str(library), "-lm"]
    subprocess.run(command, check=True)
    compiled = ctypes.CDLL(str(library))

    def error(name: str, x: np.ndarray, exact: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the absolute errors at float32 ``x``; ``by`` is what attention subtracts: 0 here."""
        y, address = np.empty_like(x), ctypes.c_void_p
        given = address(x.ctypes.data), address(y.ctypes.data), ctypes.c_long(len(x)), ctypes.c_float(0)
        getattr(compiled, f"{name}_all")(*given)
        return np.abs(y - exact(x.astype(np.float64)))

    x = np.linspace(-87, 0, 400_001).astype(np.float32)
    assert (
        error("exp_negative", x, np.exp) <= (1e-7 + 6e-8 * np.abs(x)) * np.exp(x.astype(np.float64))
    ).all()
    x = np.linspace(-12, 12, 400_001).astype(np.float32)
    size = np.maximum(1, np.abs(x))
    assert (error("gelu_erf", x, lambda v: v * (1 + erf(v / np.sqrt(2))) / 2) <= 4e-7 * size).all()
    cubic = np.sqrt(2 / np.pi)
    tanh = error("gelu_tanh", x, lambda v: v * (1 + np.tanh(cubic * (v + 0.044715 * v**3))) / 2)
    assert (tanh <= 4e-7 * size).all()

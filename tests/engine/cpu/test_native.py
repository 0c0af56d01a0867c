from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import erf

from mp2.backbone import Backbone
from mp2.doctor import as_text, examine
from mp2.engine import TorchRuntime
from mp2.engine.cpu import attention, native

P, N, T = 3, 2, 11


@pytest.fixture
def fresh() -> Iterator[None]:
    native.load.cache_clear()
    yield
    native.load.cache_clear()


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


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("way", ["switched off", "compiler missing", "compiler fails"])
def test_without_a_compiler_there_is_no_library_and_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_backbone: Backbone, way: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if way == "switched off":
        monkeypatch.setenv("MP2_NATIVE", "0")
    else:
        monkeypatch.setenv("CC", "/nowhere/cc" if way == "compiler missing" else "false")
    assert native.load() is None
    assert not list(tmp_path.rglob("*.so"))
    said = {"switched off": "MP2_NATIVE=0", "compiler missing": "/nowhere/cc", "compiler fails": "false"}[way]
    assert said in native.problem()
    assert f"; no C kernels: {native.problem()}" in TorchRuntime(tiny_backbone).reason
    assert f"none: {native.problem()}" in as_text(examine())


@pytest.mark.usefixtures("fresh")
def test_without_a_home_there_is_no_library_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert native.load() is None
    assert native.problem() == (
        "there is no cache folder (Could not determine home directory.): set XDG_CACHE_HOME"
    )


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_a_damaged_library_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = native._key(os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "clang")
    library = tmp_path / "mp2" / f"kernels-{name}.so"
    library.parent.mkdir()
    library.write_bytes(b"")
    assert native.load() is not None
    assert native.problem() == ""
    assert library.stat().st_size > 1000
    assert "C kernels" in as_text(examine())


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_library_is_made_once_and_again_for_other_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.load() is not None
    (made,) = tmp_path.rglob("*.so")
    before = made.stat().st_mtime_ns
    native.load.cache_clear()
    assert native.load() is not None
    assert made.stat().st_mtime_ns == before
    native.load.cache_clear()
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-DANOTHER"))
    assert native.load() is not None
    assert len(list(tmp_path.rglob("*.so"))) == 2


@needs_compiler
def test_exponential_and_gelu_are_as_exact_as_their_comments_say(tmp_path: Path) -> None:
    names = ("exp_negative", "gelu_erf", "gelu_tanh")
    loop = (
        "void {0}_all(const float *x, float *y, long n, float by)"
        " {{ for (long i = 0; i < n; i++) y[i] = {0}(x[i] - by); }}"
    )
    source, library = tmp_path / "all.c", tmp_path / "all.so"
    source.write_text("\n".join(['#include "vector_math.h"', *(loop.format(name) for name in names)]))
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "clang"
    include = f"-I{Path(native.__file__).parent}"
    command = [compiler, *native._FLAGS, include, str(source), "-o", str(library), "-lm"]
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

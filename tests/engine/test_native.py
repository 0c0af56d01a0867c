from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mp2.backbone import Backbone
from mp2.doctor import as_text, examine
from mp2.engine import TorchRuntime, attention, native

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

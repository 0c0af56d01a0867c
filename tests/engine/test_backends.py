from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mp2.backbone import Backbone
from mp2.backbone.encoder import activate
from mp2.engine import Objective, create_backend
from mp2.engine.backend import Probe
from mp2.engine.chain import ChainBackend
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cpu.linear import FastLinear, onednn_works
from mp2.engine.cuda.backend import CudaBackend
from mp2.engine.onnx.backend import OnnxBackend
from mp2.engine.onnx.plugins import PLUGINS
from mp2.engine.select import layer_seconds
from mp2.errors import MismatchError, MissingDependencyError, UnknownNameError, UsageError
from mp2.export import export_engine
from mp2.prompts import random_prompts
from mp2.tasks import MrcInput

from .slow_reference import SlowReference

P, N, T, M = 3, 2, 11, 5


def parts(backbone: Backbone, kind: str) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    rng = torch.Generator().manual_seed(1)
    config = backbone.config
    own_text = kind in ("P texts", "P texts, one prefix", "a prefix each")
    hidden = torch.randn(P if own_text else 1, N, T, config.hidden, generator=rng)
    if kind in ("one text", "P texts"):
        return hidden, None
    shape = {
        "P prefixes on one text": (P, 1),
        "P texts, one prefix": (1, 1),
        "a prefix each": (P, N),
        "a prefix each on one text": (P, N),
    }[kind]
    keys, values = torch.randn(2, *shape, config.n_heads, M, config.head_size, generator=rng)
    return hidden, (keys, values)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        "one text",
        "P texts",
        "P prefixes on one text",
        "P texts, one prefix",
        "a prefix each",
        "a prefix each on one text",
    ],
)
def test_layer_equals_the_encoder_one_candidate_at_a_time(
    tiny_backbone: Backbone, runtime: ChainBackend, kind: str, padded: bool
) -> None:
    hidden, prefix = parts(tiny_backbone, kind)
    mask = torch.arange(T)[None] < torch.tensor([[T], [T - 4]]) if padded else None
    got = runtime.layer(1, hidden, mask, prefix)
    n_candidates = P if kind != "one text" else 1
    assert got.shape == (n_candidates, N, T, tiny_backbone.config.hidden)
    for p in range(n_candidates):
        own = None
        if prefix is not None:
            own = tuple(x[p % len(x)].expand(N, -1, -1, -1) for x in prefix)
        expected = tiny_backbone.encoder.layer(1, hidden[p % len(hidden)], mask, own)
        real = slice(None) if mask is None else mask
        torch.testing.assert_close(got[p][real], expected[real], rtol=1e-5, atol=1e-5)


def test_embeddings_equal_the_encoder(tiny_backbone: Backbone, runtime: ChainBackend) -> None:
    encoder, width = tiny_backbone.encoder, tiny_backbone.config.hidden
    ids = torch.arange(10, 10 + N * T).view(N, T)
    for n_inline in (0, M):
        torch.testing.assert_close(runtime.embed(ids, n_inline)[0], encoder.embed(ids, n_inline))
    rows = torch.randn(P, M, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(runtime.embed_inline(rows)[:, 0], encoder.embed_inline(rows))


def test_every_backend_adds_the_backbones_token_type(
    tiny_backbone: Backbone, train: list[MrcInput], tmp_path: Path
) -> None:
    config = replace(tiny_backbone.config, token_type=1)
    encoder = copy.deepcopy(tiny_backbone.encoder)
    encoder.config = config
    backbone = replace(tiny_backbone, config=config, encoder=encoder, sha256="1" * 64)
    first, second = encoder.token_type_embeddings.weight
    assert (first - second).abs().max() > 1e-3
    export_engine(backbone, tmp_path / "engine")
    for kind in ("deep", "shallow"):
        prompts = random_prompts(backbone, kind, prompt_tokens=6, intrinsic_dim=10)
        z = prompts.z.mean(1).numpy()[None]
        expected = SlowReference(backbone, prompts).losses(z, train)
        for backend in (
            CpuBackend(backbone),
            CudaBackend(backbone, device="cpu", precision="fp32"),
            OnnxBackend(backbone, tmp_path / "engine", threads=1),
        ):
            found = Objective(backend.forward(prompts), train).full_losses(z).fetch()
            np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_fast_linear_equals_plain_linear(activation: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x, r = torch.randn(7, 48, generator=rng), torch.randn(7, 20, generator=rng)
    weight, bias = torch.randn(20, 48, generator=rng), torch.randn(20, generator=rng)
    plain = F.linear(x, weight, bias)
    linear = FastLinear(weight, bias)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x), plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(linear(x, activation), activate(activation, plain), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(linear.plus(x, r), plain + r, rtol=1e-5, atol=1e-5)


def test_without_onednn_the_plain_way_gives_the_same(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, prefix = parts(tiny_backbone, "P prefixes on one text")
    fast = CpuBackend(tiny_backbone).layer(0, hidden, None, prefix)
    monkeypatch.setattr("mp2.engine.cpu.linear.onednn_works", lambda: False)
    plain = CpuBackend(tiny_backbone).layer(0, hidden, None, prefix)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


def test_onednn_probe_survives_a_missing_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    onednn_works.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    assert not onednn_works()
    onednn_works.cache_clear()


def test_bf16_is_near_and_only_on_request(tiny_backbone: Backbone) -> None:
    hidden, (keys, values) = parts(tiny_backbone, "P prefixes on one text")
    prefix = tuple(torch.cat([x.mean(0, keepdim=True), x]) for x in (keys, values))  # the reference first
    exact = create_backend("torch", tiny_backbone)
    assert exact.precision == "fp32"
    rough = create_backend("torch", tiny_backbone, precision="bf16")
    y, x = (each.layer(0, hidden, None, (prefix[0], prefix[1])) for each in (rough, exact))
    assert y.dtype == torch.float32
    assert 0 < (y - x).abs().max() < 2**-7 * (x - x[:1]).abs().max()
    torch.testing.assert_close(y[0], x[0], rtol=1e-5, atol=1e-5)


def test_auto_says_what_it_chose_and_why(tiny_backbone: Backbone, engine_dir: Path, tmp_path: Path) -> None:
    assert "without an engine folder" in create_backend("auto", tiny_backbone).reason
    chosen = create_backend("auto", tiny_backbone, engine_dir=engine_dir)
    assert f"auto: {chosen.name}, the fastest" in chosen.reason
    assert "\n" not in chosen.reason
    fallen = create_backend("auto", tiny_backbone, engine_dir=tmp_path)
    assert fallen.name == "torch"
    assert "not onnxruntime" in fallen.reason
    assert "manifest.json" in fallen.reason


def test_a_folder_that_is_not_there_is_never_ignored(tiny_backbone: Backbone, tmp_path: Path) -> None:
    for name in ("auto", "torch"):
        with pytest.raises(
            UsageError, match=r"there is no engine folder .*nowhere; make one with 'mp2 export"
        ):
            create_backend(name, tiny_backbone, engine_dir=tmp_path / "nowhere")


def test_threads_are_checked_whatever_the_runtime(tiny_backbone: Backbone) -> None:
    for name in ("torch", "onnxruntime-tensorrt", "auto"):
        with pytest.raises(UsageError, match="threads is 0"):
            create_backend(name, tiny_backbone, threads=0)


def test_a_layer_is_timed_on_every_backend(tiny_backbone: Backbone, engine_dir: Path) -> None:
    packed = CudaBackend(tiny_backbone, device="cpu", precision="fp32")
    plain = OnnxBackend(tiny_backbone, engine_dir, threads=1)
    for inline in (False, True):
        probe = Probe(n_candidates=3, n_examples=5, n_tokens=20, prompt_tokens=4, inline=inline)
        assert str(probe) == "3 candidates x 5 x 20 tokens"
        for backend in (packed, plain, CpuBackend(tiny_backbone)):
            assert 0 < layer_seconds(backend, probe) < 10
    assert list(packed._packed) == [1]  # one layer, in the middle


def test_runtimes_that_cannot_be_had_say_what_to_do(tiny_backbone: Backbone, engine_dir: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'torch'"):
        create_backend("torhc", tiny_backbone)
    with pytest.raises(UnknownNameError, match="precision 'fp8'"):
        create_backend("torch", tiny_backbone, precision="fp8")
    for kind in PLUGINS:
        with pytest.raises(UsageError, match=f"runtime 'onnxruntime-{kind}' needs an engine folder"):
            create_backend(f"onnxruntime-{kind}", tiny_backbone)
        with pytest.raises(MissingDependencyError, match=f"pip install onnxruntime-ep-.*{kind}"):
            create_backend(f"onnxruntime-{kind}", tiny_backbone, engine_dir=engine_dir)
        with pytest.raises(UsageError, match="finds its device itself: drop --device cuda"):
            create_backend(f"onnxruntime-{kind}", tiny_backbone, engine_dir=engine_dir, device="cuda")
    with pytest.raises(UsageError, match="mp2 export"):
        create_backend("onnxruntime", tiny_backbone)
    with pytest.raises(UsageError, match="'onnxruntime-tensorrt' needs an engine folder"):
        create_backend("onnxruntime-tensorrt", tiny_backbone)
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime-gpu tensorrt"):
        create_backend("onnxruntime-tensorrt", tiny_backbone, engine_dir=engine_dir)
    with pytest.raises(MismatchError, match="holds fp32, expected bf16"):
        create_backend("onnxruntime", tiny_backbone, engine_dir=engine_dir, precision="bf16")
    with pytest.raises(UsageError, match="threads is 0"):
        create_backend("torch", tiny_backbone, threads=0)
    if not torch.cuda.is_available():
        with pytest.raises(MissingDependencyError, match="sees 0 CUDA devices"):
            create_backend("torch", tiny_backbone, device="cuda")
        with pytest.raises(MissingDependencyError, match="sees 0 CUDA devices"):
            create_backend("onnxruntime", tiny_backbone, engine_dir=engine_dir, device="cuda")


def test_too_long_sequences_are_refused_by_name(tiny_backbone: Backbone, engine_dir: Path) -> None:
    for runtime in (OnnxBackend(tiny_backbone, engine_dir, threads=1), CpuBackend(tiny_backbone)):
        with pytest.raises(UsageError, match="90 tokens and 10 inline"):
            runtime.embed(torch.zeros(1, 90, dtype=torch.long), 10)


def test_an_engine_of_another_backbone_is_refused(
    tiny_backbone: Backbone, tmp_path: Path, engine_dir: Path
) -> None:
    other = replace(tiny_backbone, sha256="f" * 64)
    with pytest.raises(MismatchError, match=r"expected 'tiny' .weights ffff"):
        create_backend("onnxruntime", other, engine_dir=engine_dir)
    assert export_engine(other, tmp_path / "other").manifest.backbone.sha256 == "f" * 64

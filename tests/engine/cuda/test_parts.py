"""Packs, split attention, fp8 products, recorded work, precisions, each against a plain computation."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lanes_double import Device
from tiny_words import tiny_vocab

from mp2.backbone import Backbone, BackboneConfig, freeze, random_backbone
from mp2.backbone.encoder import activate
from mp2.engine import Objective, Scorer, create_backend
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cuda.attention import Kernels, Part, PlainKernels, attend, choose_kernels, what_is_wrong
from mp2.engine.cuda.backend import MOST_TOKENS, CudaBackend, lanes_that_fit, tokens_that_fit
from mp2.engine.cuda.linear import (
    FP8,
    FP8_MAX,
    ActivatedLinear,
    Fp8Linear,
    HalfLinear,
    add_norm,
    quantize_rows,
)
from mp2.engine.cuda.pack import PackedStates, Spans, make_packs
from mp2.engine.cuda.replays import Graphs
from mp2.errors import UnknownNameError
from mp2.prompts import random_prompts
from mp2.tasks import MrcInput

from ..slow_reference import make_inputs


def _scales_by_row() -> bool:
    """Tell whether torch's CPU fp8 product takes a scale a row; torch 2.11's takes one a tensor."""
    try:
        Fp8Linear(torch.eye(16), torch.zeros(16))(torch.ones(2, 16))
    except RuntimeError:
        return False
    return True


needs_row_scales = pytest.mark.skipif(not _scales_by_row(), reason="this torch scales fp8 by tensor on CPUs")

H, D = 2, 8


@pytest.mark.parametrize("n_inline", [0, 3])
@pytest.mark.parametrize("limit", [1, 25, 10**6])
def test_packs_hold_every_token_once_and_know_where(limit: int, n_inline: int) -> None:
    inputs = make_inputs((4, 9, 2, 9, 6), 100)
    targets = np.array([[x.start, x.end] for x in inputs])
    packs = make_packs(inputs, targets, limit_tokens=limit, n_inline=n_inline, device="cpu")
    assert sorted(i for pack in packs for i in pack.indices) == [0, 1, 2, 3, 4]
    for pack in packs:
        assert pack.n_slots <= limit or len(pack.indices) == 1
        slots = torch.cat([pack.text_slots, pack.prompt_slots]).sort().values
        assert slots.tolist() == list(range(pack.n_slots))
        row = torch.full((1, pack.n_slots, 1), -1.0)
        row[0, pack.text_slots, 0] = pack.input_ids.float()
        grid = PackedStates(row, pack).each(lambda x: x, -7.0)[0, :, :, 0]
        for k, index in enumerate(pack.indices):
            ids = inputs[index].input_ids
            assert grid[k, : len(ids)].tolist() == ids.tolist()
            assert (grid[k, len(ids) :] == -7).all()
            assert pack.targets[k].tolist() == [inputs[index].start, inputs[index].end]
        first = pack.positions == 0
        assert int(first.sum()) == len(pack.indices)
        assert (pack.positions[~first] > n_inline).all()


def random_attention(b: int, c: int, m: int) -> tuple[torch.Tensor, Spans, tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    spans = Spans(np.array([5, 1, 7]), b, "cpu")
    qkv = torch.randn(b, 13, 3, H, D, generator=rng)
    keys, values = torch.randn(2, c, H, m, D, generator=rng)
    return qkv, spans, (keys, values)


@pytest.mark.parametrize(("b", "c"), [(1, 1), (3, 3), (3, 1), (1, 3)])
@pytest.mark.parametrize("m", [0, 1, 6])
def test_split_attention_is_one_softmax_over_prefix_and_text(b: int, c: int, m: int) -> None:
    qkv, spans, (keys, values) = random_attention(b, c, m)
    got = attend(PlainKernels(), qkv, spans, (keys, values))
    p = max(b, c) if m else b
    assert got.shape == (p, 13, H, D)
    for i in range(p):
        query, key, value = qkv[i % b].double().unbind(1)  # [S, h, d] each
        for a, z in ((0, 5), (5, 6), (6, 13)):
            for h in range(H):
                k = torch.cat([keys[i % c, h].double(), key[a:z, h]])
                v = torch.cat([values[i % c, h].double(), value[a:z, h]])
                expected = torch.softmax(query[a:z, h] @ k.T / D**0.5, -1) @ v
                torch.testing.assert_close(got[i, a:z, h].double(), expected, rtol=1e-5, atol=1e-5)


def test_flash_is_tried_only_where_it_can_be() -> None:
    kernels, why = choose_kernels(torch.device("cpu"), torch.bfloat16, H, D)
    assert (kernels.name, why) == ("plain", "bfloat16 on cpu")


def test_spans_say_where_sequences_of_all_rows_begin() -> None:
    spans = Spans(np.array([5, 1, 7]), 2, "cpu")
    assert spans.offsets.tolist() == [0, 5, 6, 13, 18, 19, 26]
    assert spans.offsets.dtype == torch.int32
    assert (spans.longest, spans.row_slots) == (7, 13)


@needs_row_scales
def test_fp8_products_are_near_and_rows_do_not_know_each_other() -> None:
    rng = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(32, 64, generator=rng), torch.randn(32, generator=rng)
    weight[3] *= 1e3  # a scale a channel keeps the others exact
    x = torch.randn(48, 64, generator=rng).bfloat16()
    x[5] *= 1e4
    linear = Fp8Linear(weight, bias)
    got = linear(x)
    assert got.dtype == torch.bfloat16
    exact = x.double() @ weight.double().T + bias.double()
    rows = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    assert float(((got - exact).abs() / rows).max()) < 0.03
    torch.testing.assert_close(linear(x[:16]), got[:16], rtol=0, atol=0)


def test_quantised_rows_use_the_whole_range_and_survive_zeros() -> None:
    x = torch.stack([torch.linspace(-3, 5, 16), torch.zeros(16)])
    rows, scale = quantize_rows(x)
    assert rows.dtype == FP8
    assert float(rows[0].float().abs().max()) == FP8_MAX
    torch.testing.assert_close(rows.float() * scale, x, rtol=1 / 16, atol=1e-2)
    assert torch.isfinite(rows.float()).all()


def test_add_norm_does_not_overflow_in_half_precision() -> None:
    x = torch.full((2, 8), 6e4, dtype=torch.float16)
    x[:, ::2] = -6e4
    got = add_norm(x, x, torch.ones(8), torch.zeros(8), 1e-12)
    torch.testing.assert_close(got.float().abs(), torch.ones(2, 8), rtol=1e-3, atol=0)


class Rounded(PlainKernels):
    """Right but for rounding: float32 inside, weights and results in half precision, as flash attention's."""

    name = "rounded"

    def text(self, qkv: torch.Tensor, spans: Spans) -> Part:
        context, lse = super().text(qkv.float(), spans)
        return context.to(qkv.dtype), lse

    def prefix(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Part:
        context, lse = super().prefix(query.float(), keys.float(), values.float())
        return context.to(query.dtype), lse


class OneTooFew(Rounded):
    """Does not see the last key of the prefix."""

    def prefix(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Part:
        return super().prefix(query, keys[:, :, :-1], values[:, :, :-1])


class AnotherScale(Rounded):
    """Divides scores by the head size instead of its root."""

    def text(self, qkv: torch.Tensor, spans: Spans) -> Part:
        scaled = torch.cat([qkv[:, :, :1] * qkv.shape[-1] ** -0.5, qkv[:, :, 1:]], 2)
        return super().text(scaled, spans)


class TwoUnitsOff(Rounded):
    """Off by two units in the last place at the largest context: two roundings."""

    def text(self, qkv: torch.Tensor, spans: Spans) -> Part:
        context, lse = super().text(qkv, spans)
        most = context.abs().max()
        unit = torch.finfo(qkv.dtype).eps * 2 ** int(torch.log2(most.float()))
        return torch.where(context.abs() == most, context - 2 * unit * context.sign(), context), lse


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_heads", [1, 4])
def test_the_probe_of_attention_takes_what_rounding_does_and_refuses_what_is_wrong(
    dtype: torch.dtype, n_heads: int
) -> None:
    def probe(kernels: Kernels) -> str:
        return what_is_wrong(kernels, torch.device("cpu"), dtype, n_heads, 64)

    assert probe(Rounded()) == probe(TwoUnitsOff()) == ""
    for wrong in (OneTooFew(), AnotherScale()):
        assert probe(wrong).startswith("rounded attention is off by ")

    class Missing(Rounded):
        def text(self, qkv: torch.Tensor, spans: Spans) -> Part:
            raise RuntimeError("no kernel for this device\nmore")

    assert probe(Missing()) == "no rounded attention here: no kernel for this device"


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_an_activation_in_the_product_is_the_one_after_it(activation: str) -> None:
    """On a CPU, where torch's has the exact GELU."""
    rng = torch.Generator().manual_seed(0)
    x, weight, bias = torch.randn(7, 24, generator=rng), torch.randn(40, 24, generator=rng), torch.randn(40)
    expected = activate(activation, HalfLinear(weight, bias)(x))
    torch.testing.assert_close(ActivatedLinear(weight, bias, activation)(x), expected)


class Doubling:
    """A recorder whose graphs double their buffer."""

    n_recorded = 0

    def __call__(self, work: Any) -> Any:
        self.n_recorded += 1
        output = torch.zeros_like(work())

        class Graph:
            def replay(self) -> None:
                output.copy_(work())

        return Graph(), output


def test_replays_read_new_inputs_through_old_buffers() -> None:
    recorder = Doubling()
    graphs = Graphs(recorder)
    outside = torch.ones(2)

    def call(key: str, value: float) -> list[float]:
        x = torch.full((2,), value)
        return graphs(key, (x,), lambda held: held[0] * 2 + outside).tolist()

    assert [call("a", v) for v in (1.0, 2.0, 3.0)] == [[3.0, 3.0], [5.0, 5.0], [7.0, 7.0]]
    outside += 1  # updated in place, as the incumbent's keys are
    assert call("a", 3.0) == [8.0, 8.0]
    assert call("b", 1.0) == [4.0, 4.0]
    assert (graphs.n_recorded, recorder.n_recorded) == (1, 1)
    graphs.restart(recorder)
    assert graphs.n_recorded == 0
    assert call("a", 5.0) == [12.0, 12.0]
    assert graphs.n_recorded == 0


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "CUDA error: operation failed due to a previous error during capture\n"
            "Search for `cudaErrorStreamCaptureInvalidated' in the CUDA documentation"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ..."),
        ValueError(),
    ],
)
def test_what_cannot_be_recorded_runs_plainly_and_other_keys_are_still_recorded(error: Exception) -> None:
    doubling = Doubling()
    fails, n_tried, notes = {"a", "c"}, [0], list[str]()
    key = ""

    def record(work: Any) -> Any:
        if key in fails:
            n_tried[0] += 1
            raise error
        return doubling(work)

    graphs = Graphs(record, notes.append)
    for value in (1.0, 2.0, 3.0, 4.0):
        for key in ("a", "b", "c"):
            x = torch.full((2,), value)
            assert graphs(key, (x,), lambda held: held[0] * 2).tolist() == [2 * value] * 2
    assert (n_tried[0], graphs.n_recorded) == (2, 1)
    reason = str(error).split("\n")[0] or "ValueError"
    assert notes == [f"not recorded as a CUDA graph, runs kernel by kernel ({reason})"]


def test_work_that_fails_by_itself_is_not_hidden_by_a_failed_recording() -> None:
    def record(work: Any) -> Any:
        raise RuntimeError("no capture")

    def work(held: Any) -> torch.Tensor:
        if float(held[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return held[0]

    graphs = Graphs(record, lambda line: None)
    graphs("a", (torch.tensor(1.0),), work)
    with pytest.raises(torch.OutOfMemoryError):
        graphs("a", (torch.tensor(2.0),), work)


def test_lanes_are_as_many_as_memory_allows() -> None:
    a_batch = 2 * 2 * (16 * 1024 + 2 * 4096)  # two copies, two bytes
    assert lanes_that_fit(1000 * a_batch, 100, 1024, 4096, 2) == 6
    assert lanes_that_fit(1000 * a_batch, 50, 1024, 4096, 2) == 12
    assert lanes_that_fit(1, 100, 1024, 4096, 2) == 1


def test_batches_are_as_large_as_memory_allows() -> None:
    assert tokens_that_fit(80 << 30, 1024, 4096, 2) == MOST_TOKENS
    small = tokens_that_fit(1 << 30, 1024, 4096, 2)
    assert 1000 < small < MOST_TOKENS
    assert small * 2 * (16 * 1024 + 2 * 4096) <= 0.6 * (1 << 30)
    assert tokens_that_fit(0, 1024, 4096, 2) == 1


@pytest.fixture(scope="module")
def wide() -> Backbone:
    """A backbone whose widths fp8 products can take (multiples of 16), with weights that matter."""
    config = BackboneConfig(
        name="wide",
        n_layers=2,
        hidden=64,
        n_heads=4,
        ffn=128,
        vocab_size=len(tiny_vocab()),
        max_positions=96,
    )
    backbone = random_backbone(config, tiny_vocab(), seed=3)
    with torch.no_grad():
        for name, parameter in backbone.encoder.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)
    return backbone


@pytest.mark.parametrize("kind", ["deep", "shallow"])
@pytest.mark.parametrize(
    ("precision", "noise", "least"),
    [
        ("fp16", 0.006, 0.999),
        ("bf16", 0.04, 0.998),
        pytest.param("fp8", 0.3, 0.95, marks=needs_row_scales),
    ],
)
def test_low_precision_adds_noise_of_its_rounding_and_keeps_the_order(
    wide: Backbone, kind: Literal["deep", "shallow"], precision: str, noise: float, least: float
) -> None:
    """``noise``: of the spread of losses; seven to eight times more for each three bits of mantissa less."""
    prompts = random_prompts(wide, kind, prompt_tokens=4, intrinsic_dim=6, scale=20.0, seed=1)
    train = make_inputs((9, 14, 5, 30), wide.config.vocab_size)
    z = 20 * np.random.default_rng(0).standard_normal((60, *prompts.z.shape[::2])).astype(np.float32)
    exact = Objective(CpuBackend(wide).forward(prompts), train).full_losses(z).fetch()
    assert exact.std() > 0.04 * exact.mean()  # the prompts matter
    runtime = CudaBackend(wide, device="cpu", precision=precision)
    rough = Objective(runtime.forward(prompts), train).full_losses(z).fetch()
    assert noise / 10 < float((rough - exact).std() / exact.std()) < noise
    ranks = [np.argsort(np.argsort(x)) for x in (exact, rough)]
    assert np.corrcoef(*ranks)[0, 1] > least


def test_an_unknown_precision_names_those_of_the_device(wide: Backbone) -> None:
    with pytest.raises(UnknownNameError, match="fp8"):
        CudaBackend(wide, device="cpu", precision="fp9")
    with pytest.raises(UnknownNameError, match="device cpu"):
        create_backend("torch", wide, precision="fp8")


def test_auto_takes_the_cpu_in_fp32_without_a_gpu(wide: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runtime = create_backend("auto", wide, device="auto", precision="auto")
    assert (runtime.device, runtime.precision) == ("cpu", "fp32")


def test_auto_takes_the_gpu_in_fp16_and_says_what_it_goes_on_in_after_an_overflow(
    wide: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice alone: what it makes is put on the CPU here."""
    made: dict[str, Any] = {}

    class Pretending(CudaBackend):
        def __init__(self, backbone: Backbone, **options: Any) -> None:
            made.update(options)
            super().__init__(backbone, **{**options, "device": "cpu"})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr("mp2.engine.select.CudaBackend", Pretending)
    runtime = create_backend("auto", wide, device="auto", precision="auto")
    assert made["device"] == "cuda"
    assert (made["precision"], made["wider"]) == ("fp16", "fp32")  # a T4 has no bf16
    assert "there is a GPU, fp16 is usual there" in runtime.reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    create_backend("torch", wide, device="cuda", precision="auto")
    assert (made["precision"], made["wider"]) == ("fp16", "bf16")
    create_backend("torch", wide, device="cuda", precision="fp16")
    assert made["wider"] is None  # what was asked for stays
    prompts = random_prompts(wide, "deep", prompt_tokens=4, intrinsic_dim=6)
    inputs: list[MrcInput] = make_inputs((5, 6), wide.config.vocab_size)
    z = prompts.z.mean(1).numpy()[None]
    assert np.isfinite(Objective(runtime.forward(prompts), inputs).full_losses(z).fetch()).all()


@pytest.fixture(scope="module")
def overflowing(wide: Backbone) -> Backbone:
    """``wide`` with a feed-forward bias that float16 cannot hold; the weight behind it makes it small."""
    encoder = deepcopy(wide.encoder)
    with torch.no_grad():
        body = encoder.body(1)
        body.intermediate.bias[0] = 1e5
        body.output.weight[:, 0] *= 1e-4
    return freeze(wide.config, encoder, wide.tokenizer)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
@pytest.mark.parametrize("begin", ["full", "visit", "score"])
def test_the_first_evaluation_that_overflows_changes_the_precision_once_and_for_all(
    overflowing: Backbone,
    kind: Literal["deep", "shallow"],
    begin: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = random_prompts(overflowing, kind, prompt_tokens=4, intrinsic_dim=6, scale=20.0, seed=1)
    train = make_inputs((9, 14, 5, 30), overflowing.config.vocab_size)
    z = 20 * np.random.default_rng(0).standard_normal((6, *prompts.z.shape[::2])).astype(np.float32)

    def evaluate(backend: CudaBackend) -> list[np.ndarray]:
        backend.lanes = Device().make_lanes()
        runs = [Objective(backend.forward(prompts), train) for _ in range(2)]
        found = []
        for _ in range(3):  # run, recorded, replayed
            for run in runs:
                steps: dict[str, Callable[[], Any]] = {
                    "full": lambda run=run: run.full_losses(z).fetch(),  # type: ignore[misc]
                    "visit": lambda run=run: run.layer_losses(0, z[:, 0]).fetch(),  # type: ignore[misc]
                    "score": lambda run=run: np.stack(  # type: ignore[misc]
                        Scorer(run.forward).outputs(z[0], train).fetch()
                    ),
                }
                run.set_incumbent(z[0])
                found += [steps.pop(begin)(), *(step() for step in steps.values())]
        return found

    expected = evaluate(CudaBackend(overflowing, device="cpu", precision="bf16"))
    assert np.isfinite(expected[0]).all() or begin == "score"
    capsys.readouterr()
    backend = CudaBackend(overflowing, device="cpu", precision="fp16", wider="bf16", reason="auto")
    found = evaluate(backend)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (backend.precision, backend.dtype, backend.wider) == ("bf16", torch.bfloat16, None)
    assert capsys.readouterr().err == "mp2: fp16 overflows over wide; bf16 from here on\n"
    assert backend.reason == "auto; fp16 overflowed"
    asked_for = CudaBackend(overflowing, device="cpu", precision="fp16")
    losses = Objective(asked_for.forward(prompts), train).full_losses(z).fetch()
    assert np.isnan(losses).all()
    assert asked_for.precision == "fp16"


def test_neither_a_nan_candidate_nor_a_later_overflow_changes_the_precision(
    wide: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = random_prompts(wide, "deep", prompt_tokens=4, intrinsic_dim=6)
    backend = CudaBackend(wide, device="cpu", precision="fp16", wider="bf16")
    objective = Objective(backend.forward(prompts), make_inputs((9, 5), wide.config.vocab_size))
    z = np.ones((2, *prompts.z.shape[::2]), np.float32)
    z[1, 0, 0] = np.nan
    assert np.isnan(objective.full_losses(z).fetch()).tolist() == [False, True]
    assert backend.precision == "fp16"
    z[1] = 1e9  # keys and values that are infinite in float16
    assert np.isnan(objective.full_losses(z).fetch()).tolist() == [False, True]
    assert backend.precision == "fp16"
    assert capsys.readouterr().err == ""


def test_the_packed_path_describes_its_batches(wide: Backbone) -> None:
    prompts = random_prompts(wide, "shallow", prompt_tokens=4, intrinsic_dim=6)
    inputs = make_inputs((5, 6, 30), wide.config.vocab_size)
    runtime = CudaBackend(wide, device="cpu", precision="fp32")
    found = Objective(runtime.forward(prompts, micro_batch_tokens=60), inputs).cut(5)
    assert (found["groups"], found["batches"], found["padding"]) == (1, 5, 0.0)

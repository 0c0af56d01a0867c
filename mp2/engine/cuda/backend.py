"""The CUDA backend: packed rows, flash attention, half precision or fp8 weights.

The same code runs on a CPU (plain attention, eager steps, and Triton's in its interpreter), which is how its
losses are tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F

from mp2.backbone import Backbone, resolve_device
from mp2.backbone.encoder import Prefix, activate
from mp2.engine.backend import CACHE_BYTES, Probe
from mp2.engine.cuda.attention import Attend, attend, choose_kernels
from mp2.engine.cuda.forward import PackedForward
from mp2.engine.cuda.lanes import CudaLane, HostLane, Lane, Lanes
from mp2.engine.cuda.linear import ActivatedLinear, Fp8Linear, HalfLinear, Linear
from mp2.engine.cuda.pack import Pack, Spans, make_packs
from mp2.engine.cuda.steps import choose_steps
from mp2.errors import MissingDependencyError, UnknownNameError
from mp2.heads import Head
from mp2.messages import say
from mp2.prompts import PrefixProjector, PromptSet

CUDA_PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
_FP8_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0)
MOST_TOKENS = 65536  # a batch: more is no faster, products are at full rate long before
_MEMORY_SHARE = 0.6  # of the free memory may hold a batch's activations; the rest is for caches and graphs
_COPIES = 2  # of a lane's activations: its graphs' pool and what the allocator keeps of plain runs
_WIDTHS = 16.0  # hidden-sized rows alive at once inside a layer, per token: qkv, contexts, feed-forward twice


@dataclass(frozen=True)
class _PackedLayer:
    qkv: Linear  # query, key and value in one product
    attention_output: Linear
    intermediate: Linear
    activate: Callable[[torch.Tensor], torch.Tensor]  # nothing to do where a neighbour's kernel does it
    output: Linear
    attention_norm: tuple[torch.Tensor, torch.Tensor]
    output_norm: tuple[torch.Tensor, torch.Tensor]


class CudaBackend:
    """`Backend` over packs."""

    name = "torch"
    deep_inline = False

    def __init__(
        self,
        backbone: Backbone,
        *,
        device: str = "cuda",
        precision: str = "bf16",
        reason: str = "",
        wider: str | None = None,
        one_kernel: bool = False,
        fused_activation: bool = False,
    ) -> None:
        """Put the backbone on ``device`` in ``precision`` (one of ``CUDA_PRECISIONS``).

        fp16 and bf16 keep weights and activations in that type; norms, softmax, logits and losses stay in
        float32. fp8 does all matrix products of the layers in e4m3 with row-wise scales, the rest as bf16.
        ``wider`` is the precision that everything goes on in where the first evaluation of a forward
        overflows: gives NaN for candidates that are numbers.

        Two flags, off until a GPU has shown that they pay: ``one_kernel`` does attention over prefix and text
        in one Triton kernel, ``fused_activation`` the activation in the product before it (in fp8: in the
        quantisation after it). `ActivatedLinear` says what the latter changes.

        Raises UnknownNameError (precision), MissingDependencyError (no such device, no fp8 on it, or no
        triton for a flag).
        """
        if precision not in CUDA_PRECISIONS:
            raise UnknownNameError("precision", precision, CUDA_PRECISIONS)
        place = resolve_device(device)
        if place.type == "cuda" and precision == "fp8":
            capability = torch.cuda.get_device_capability(place)
            if capability < _FP8_CAPABILITY:
                raise MissingDependencyError(
                    f"device '{device}' has compute capability {capability[0]}.{capability[1]}, "
                    "fp8 needs at least 8.9; use --precision bf16"
                )
        self.backbone = backbone
        self.device = device
        self.reason = reason or "asked for"
        self.wider = wider
        self._config, self._encoder = backbone.config, backbone.encoder
        self._place = place
        self._one_kernel, self._fused_activation = one_kernel, fused_activation
        self._compute_in(precision)
        self._packed: dict[int, _PackedLayer] = {}
        self._spans: dict[tuple[bytes, int], Spans] = {}
        encoder = backbone.encoder
        self._token_type = backbone.config.token_type
        self._tables = tuple(
            table.weight.detach().to(place, torch.float32)
            for table in (
                encoder.word_embeddings,
                encoder.position_embeddings,
                encoder.token_type_embeddings,
                encoder.embedding_norm,
            )
        )
        self._embedding_bias = encoder.embedding_norm.bias.detach().to(place, torch.float32)
        self._projectors: WeakValueDictionary[int, PrefixProjector] = WeakValueDictionary()
        self._forwards: WeakSet[PackedForward] = WeakSet()
        self.lanes = Lanes(self._make_lane, self._free_memory)
        self.settle()

    def forward(
        self,
        prompts: PromptSet,
        head: Head | None = None,
        *,
        micro_batch_tokens: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> PackedForward:
        """See `Backend.forward`."""
        made = PackedForward(self, prompts, head, micro_batch_tokens or self.most_tokens(), cache_bytes)
        self._forwards.add(made)
        return made

    def widen(self) -> None:
        """Go on in the wider precision, for good; all forwards forget what they have in the other.

        Called in the thread that launches. What is under way arrives as it was computed.
        """
        assert self.wider is not None
        say(f"{self.precision} overflows over {self.backbone.config.name}; {self.wider} from here on")
        self.reason += f"; {self.precision} overflowed"
        self._free_memory()  # first of all it waits: what is under way needs its memory
        self._packed.clear()
        self._projectors.clear()
        self._compute_in(self.wider)
        self.wider = None
        for forward in list(self._forwards):
            forward.begin_again()
        self._free_memory()

    def _compute_in(self, precision: str) -> None:
        """Choose type and kernels; ``notes`` says which."""
        config, place = self._config, self._place
        self.precision, self.dtype = precision, _DTYPES[precision]
        self.kernels, slow_attention = choose_kernels(place, self.dtype, config.n_heads, config.head_size)
        self.steps, slow_steps = choose_steps(place, self.dtype, config.hidden, fp8=precision == "fp8")
        self.attend: Attend = partial(attend, self.kernels)
        attention = self.kernels.name
        if self._one_kernel:
            self.attend, attention, slow_attention = _triton_steps().attend, "in one kernel", ""
        self.notes = f"attention {attention}" + (f" ({slow_attention})" if slow_attention else "")
        self.notes += f"; steps {self.steps.name}" + (f" ({slow_steps})" if slow_steps else "")
        if place.type == "cuda" and (slow_steps or (slow_attention and precision != "fp32")):
            say(f"slower than it could be on {self.device} in {precision}: {self.notes}")

    def share(self, n_runs: int) -> None:
        """See `Backend.share`."""
        self.lanes.spread(n_runs)

    def probe(self, probe: Probe) -> Callable[[], object]:
        """See `Backend.probe`."""
        from mp2.tasks import MrcInput

        config = self._config
        rng = torch.Generator().manual_seed(0)
        ids = torch.randint(0, config.vocab_size, (probe.n_examples, probe.n_tokens), generator=rng)
        no_options = np.empty((0, 2), dtype=np.int64)
        inputs = [MrcInput(i, row, 0, 0, no_options) for i, row in enumerate(ids.numpy())]
        no_targets = np.empty((len(inputs), 0), dtype=np.int64)
        (pack,) = make_packs(inputs, no_targets, limit_tokens=ids.numel(), n_inline=0, device=self._place)
        hidden = self.embed_pack(pack).expand(probe.n_candidates, -1, -1).contiguous()
        shape = (1, config.n_heads, probe.prompt_tokens, config.head_size)
        rows = torch.randn(shape, generator=rng).to(self._place, self.dtype)
        prefix = None if probe.inline else (rows, rows)

        def run() -> None:
            self.packed_layer(config.n_layers // 2, hidden, pack, prefix)
            self.settle()

        return run

    def projector(self, prompts: PromptSet) -> PrefixProjector:
        """Return the projector of ``prompts``, the same one as long as somebody uses it."""
        key = id(prompts)  # a projector keeps them, so that the id stays theirs
        found = self._projectors.get(key)
        if found is None:
            found = PrefixProjector(self._encoder, prompts, self._place, self.dtype, self.settle)
            self._projectors[key] = found
        return found

    def settle(self) -> None:
        """Complete what was queued here: what was made by it may now be read on any lane."""
        if self._place.type == "cuda":
            torch.cuda.current_stream(self._place).synchronize()

    def _make_lane(self) -> Lane:
        return CudaLane(self._place) if self._place.type == "cuda" else HostLane()

    def _free_memory(self) -> None:
        if self._place.type == "cuda":
            torch.cuda.synchronize(self._place)
            torch.cuda.empty_cache()

    def side_by_side(self, batch_tokens: int) -> int:
        """See `Backend.side_by_side`; as many as fit the free memory, each on a lane of its own.

        At least 1; on a CPU, whose cores one batch fills, 1.
        """
        if self._place.type != "cuda":
            return 1
        free, _ = torch.cuda.mem_get_info(self._place)
        return lanes_that_fit(free, batch_tokens, self._config.hidden, self._config.ffn, self.dtype.itemsize)

    def most_tokens(self) -> int:
        """Tokens that a batch may hold: as many as are useful, or as fit the memory that is free now."""
        if self._place.type != "cuda":
            return MOST_TOKENS
        free, _ = torch.cuda.mem_get_info(self._place)
        return tokens_that_fit(free, self._config.hidden, self._config.ffn, self.dtype.itemsize)

    def spans(self, pack: Pack, n_rows: int) -> Spans:
        """The spans of ``n_rows`` rows of the pack, made once."""
        key = (pack.slots.tobytes(), n_rows)
        if key not in self._spans:
            self._spans[key] = Spans(pack.slots, n_rows, self._place)
        return self._spans[key]

    @torch.inference_mode()
    def embed_pack(
        self, pack: Pack, prompts: torch.Tensor | None = None, placeholders: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return what enters layer 0, [1 or P, S, H], with inline ``prompts`` [P, m, H] in their slots.

        With ``placeholders`` [1, m, H], word embeddings, the prompts are added to theirs after the norm.
        """
        words, positions, token_types, _ = self._tables
        token_type = token_types[self._token_type]
        text = self._embedding_norm(words[pack.input_ids] + positions[pack.positions] + token_type)
        n_rows = 1 if prompts is None else len(prompts)
        hidden = text.new_empty(n_rows, pack.n_slots, text.shape[-1])
        hidden[:, pack.text_slots] = text
        if prompts is not None:
            m = prompts.shape[1]
            own = prompts.to(self._place)
            inner = own if placeholders is None else placeholders
            rows = self._embedding_norm(inner + positions[1 : m + 1] + token_type)
            rows = rows if placeholders is None else rows + own
            hidden[:, pack.prompt_slots] = rows.repeat(1, len(pack.lengths), 1)
        return hidden.to(self.dtype)

    @torch.inference_mode()
    def packed_layer(
        self, index: int, hidden: torch.Tensor, pack: Pack, prefix: Prefix | None
    ) -> torch.Tensor:
        """Return layer ``index``'s output [P, S, H].

        ``hidden`` is [B, S, H], ``prefix`` keys and values [C, h, m, d_h] in the backend's type; B = C = P,
        or one of both is 1.
        """
        layer = self._packed.get(index) or self._prepare_packed(index)
        config, eps = self._config, self._config.layer_norm_eps
        b, s, width = hidden.shape
        qkv = layer.qkv(hidden.reshape(b * s, width)).view(b, s, 3, config.n_heads, config.head_size)
        context = self.attend(qkv, self.spans(pack, b), prefix)
        p = context.shape[0]
        mixed = layer.attention_output(context.reshape(p * s, width)).view(p, s, width)
        y = self.steps.add_norm(mixed, hidden, *layer.attention_norm, eps).reshape(p * s, width)
        inner = layer.activate(layer.intermediate(y))
        return self.steps.add_norm(layer.output(inner), y, *layer.output_norm, eps).view(p, s, width)

    def _embedding_norm(self, x: torch.Tensor) -> torch.Tensor:
        gain = self._tables[3]
        return F.layer_norm(x, gain.shape, gain, self._embedding_bias, self._config.layer_norm_eps)

    def _prepare_packed(self, index: int) -> _PackedLayer:
        source = self._encoder.body(index)

        fp8, activation = self.precision == "fp8", self._config.activation
        fused = activation if self._fused_activation else ""

        def linear(*names: str) -> Linear:
            modules = [getattr(source, name) for name in names]
            weight = torch.cat([m.weight.detach().to(self._place) for m in modules])
            bias = torch.cat([m.bias.detach().to(self._place) for m in modules])
            if fp8:
                quantize = self.steps.quantize
                if fused and names == ("output",):
                    quantize = partial(_triton_steps().quantize, activation=fused)
                return Fp8Linear(weight, bias, quantize)
            weight, bias = weight.to(self.dtype), bias.to(self.dtype)
            if fused and names == ("intermediate",):
                return ActivatedLinear(weight, bias, fused)
            return HalfLinear(weight, bias)

        def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            module = getattr(source, name)
            return tuple(x.detach().to(self._place, torch.float32) for x in (module.weight, module.bias))  # type: ignore[return-value]

        packed = _PackedLayer(
            qkv=linear("query", "key", "value"),
            attention_output=linear("attention_output"),
            intermediate=linear("intermediate"),
            activate=(lambda x: x) if fused else partial(activate, activation),
            output=linear("output"),
            attention_norm=norm("attention_norm"),
            output_norm=norm("output_norm"),
        )
        self.settle()
        self._packed[index] = packed
        return packed


def _triton_steps() -> Any:
    """Return the module of Triton kernels; MissingDependencyError without triton."""
    try:
        from mp2.engine.cuda import triton_steps
    except ImportError as error:
        raise MissingDependencyError(
            "one_kernel and fp8's fused_activation need triton, which comes with CUDA builds of torch; "
            "pip install triton, or leave them off"
        ) from error
    return triton_steps


def tokens_that_fit(free_bytes: int, hidden: int, ffn: int, itemsize: int) -> int:
    """Tokens of a batch whose activations fit ``free_bytes``, at most ``MOST_TOKENS``, at least 1."""
    a_token = _token_bytes(hidden, ffn, itemsize)
    return int(max(1, min(MOST_TOKENS, _MEMORY_SHARE * free_bytes / a_token)))


def lanes_that_fit(free_bytes: int, batch_tokens: int, hidden: int, ffn: int, itemsize: int) -> int:
    """Lanes whose batches fit ``free_bytes`` together, at least 1."""
    a_lane = _COPIES * batch_tokens * _token_bytes(hidden, ffn, itemsize)
    return int(max(1, _MEMORY_SHARE * free_bytes / a_lane))


def _token_bytes(hidden: int, ffn: int, itemsize: int) -> float:
    return itemsize * (_WIDTHS * hidden + 2 * ffn)

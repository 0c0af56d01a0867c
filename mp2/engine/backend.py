"""The one seam of the engine: what computes hidden states for whole populations of prompts.

A `Backend` is a frozen encoder on a device. Its `Forward` makes batches of inputs, runs all layers for a
population, visits one layer from cached inputs, moves the cached inputs up a layer, and reads the hidden
states through a head. Everything above it (losses, scores, searches) is the same for every device.

Shapes: P candidates, N examples, T tokens, H hidden, h heads, d_h head size, m prompt tokens, L' layers that
have prompts, d their intrinsic size.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from mp2.engine.cache import ActivationCache
from mp2.errors import Mp2Error, OutOfMemoryError, UsageError
from mp2.heads import Head, SpanHead

if TYPE_CHECKING:
    from mp2.backbone import Backbone
    from mp2.prompts import PromptSet
    from mp2.tasks import MrcInput

T = TypeVar("T")
U = TypeVar("U")

Prefixes = tuple[torch.Tensor, torch.Tensor]
"""Keys and values ``[P or 1, N or 1, h, m, d_h]``, put before a layer's own."""

Arrival = Callable[[], np.ndarray]
"""Waits for a result on its way to the host, and returns it; once, from any thread."""

PRECISIONS = ("fp32", "bf16", "int8")
CACHE_BYTES = 2 << 30  # of cached layer inputs


@dataclass(frozen=True)
class Pending(Generic[T]):
    """A result that a device may still be computing.

    Whoever starts work and whoever waits for it need not be the same: several runs share a GPU by having
    their evaluations launched one after another, without waiting, and each waits for its own.
    """

    fetch: Callable[[], T]
    """Wait for it and return it; once, from any thread."""
    ready: bool = False
    """Nothing has to be waited for."""

    @classmethod
    def of(cls, value: T) -> Pending[T]:
        """Return a result that is there."""
        return cls(lambda: value, ready=True)

    def then(self, change: Callable[[T], U]) -> Pending[U]:
        """Return ``change`` of the result: now, or when it is fetched, in the thread that fetches it."""
        return Pending.of(change(self.fetch())) if self.ready else Pending(lambda: change(self.fetch()))


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Examples that are computed together; each backend adds what it needs."""

    indices: np.ndarray  # [n] int64, positions in the caller's order
    lengths: np.ndarray  # [n] int64, text tokens
    n_tokens: int  # rows that the layers compute for one candidate, with padding and inline prompts
    targets: torch.Tensor  # [n, k] int64, see `Head.targets`

    @property
    def n_examples(self) -> int:
        """n."""
        return len(self.indices)


class Run(Protocol):
    """A population, ready to run over batches."""

    def __call__(self, batch: Batch, candidates: slice, *, again: bool = True) -> Arrival:
        """Begin the head's outputs [p, n, ...] (p may be 1 where nothing differs) of some ``candidates``.

        ``again``: the same batch will come again, so that recording what it needs may pay.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The batch that a layer is timed on: ``n_candidates`` texts under one prompt of ``prompt_tokens`` rows.

    ``inline``: no rows before the layer's keys and values, as below the last layer of shallow prompts.
    """

    n_candidates: int = 1
    n_examples: int = 8
    n_tokens: int = 64
    prompt_tokens: int = 16
    inline: bool = False

    def __str__(self) -> str:
        """Return it for people."""
        candidates = f"{self.n_candidates} candidates x " if self.n_candidates > 1 else ""
        return f"{candidates}{self.n_examples} x {self.n_tokens} tokens"


class Backend(Protocol):
    """A frozen encoder on a device."""

    name: str
    device: str
    precision: str
    reason: str  # why this backend: one line, for people
    backbone: Backbone

    def forward(
        self,
        prompts: PromptSet,
        head: Head | None = None,
        *,
        micro_batch_tokens: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> Forward:
        """Return what computes ``prompts``' kind of candidates, read by ``head`` (None: the prompts' own).

        A batch holds at most ``micro_batch_tokens`` (None: as suits the device and its free memory).

        Raises MismatchError for prompts of another backbone, UsageError for a kind that it cannot run.
        """
        ...

    def side_by_side(self, batch_tokens: int) -> int:
        """Return how many runs may compute batches of ``batch_tokens`` at a time; 1: one after another."""
        ...

    def share(self, n_runs: int) -> None:
        """Let up to ``n_runs`` runs, as many as `side_by_side` says, compute at a time from now on."""
        ...

    def probe(self, probe: Probe) -> Callable[[], object]:
        """Return what runs one layer on ``probe``, waiting for it."""
        ...


class Forward(ABC):
    """What a backend computes for one set of prompts, read by one head.

    The incumbent is the prompt that visits of a layer start from; of it, this keeps keys and values and the
    inputs of layers. ``generation`` changes when all batches that were made before are void.
    """

    queues = False  # results arrive later than they are asked for

    def __init__(
        self,
        backend: Backend,
        prompts: PromptSet,
        head: Head | None,
        micro_batch_tokens: int,
        cache_bytes: int,
    ) -> None:
        """Subclasses raise UsageError for prompts that they cannot run."""
        backbone = backend.backbone
        prompts.check_fits(backbone)
        head = SpanHead(prompts.span_weight, prompts.span_bias) if head is None else head
        self.backend, self.prompts = backend, prompts
        self.head = head.to(torch.device(backend.device))
        self.n_layers = backbone.config.n_layers if head.layer is None else head.layer  # that run
        self.prefixed = prompts.meta.injection == "prefix"
        self.n_inline: int = prompts.meta.n_inline
        self.micro_batch_tokens = micro_batch_tokens
        self.generation = 0
        self.incumbent: torch.Tensor | None = None  # z [L', d]
        self.cache: ActivationCache[Batch] = ActivationCache(self.advance, self.embed, cache_bytes)
        self._max_positions = backbone.config.max_positions
        self._largest = 0  # rows of the largest piece since memory last ran out
        self._stale: set[int] = set()  # layers whose prefix is not that of the incumbent any more

    @abstractmethod
    def _batches(self, inputs: Sequence[MrcInput], n_candidates: int) -> Sequence[Batch]: ...

    @abstractmethod
    def every_layer(self, z: torch.Tensor, *, scoring: bool = False) -> Run:
        """Return the run of candidates ``z`` [P, L', d] through all layers.

        Outputs are the head's for training, or those for ``scoring``.
        """

    @abstractmethod
    def visit(self, layer: int, z: torch.Tensor) -> Run:
        """Return the run, from cached inputs, of candidates that have ``z`` [P, d] at ``layer``.

        All other layers have the incumbent's prompts. For prefixes only.
        """

    @abstractmethod
    def embed(self, batch: Batch) -> torch.Tensor:
        """Return what enters layer 0."""

    @abstractmethod
    def advance(self, batch: Batch, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of ``layer`` under the incumbent, for the input ``hidden``."""

    @abstractmethod
    def _hold(self, layer: int, z: torch.Tensor) -> None:
        """Make the prefix of ``z`` [1, d] the incumbent's at ``layer``."""

    def queue(self) -> AbstractContextManager[Any]:
        """Inside, work goes where this forward's work is done in order."""
        return nullcontext()

    def chunk_of_candidates(self) -> int | None:
        """Return how many candidates' prompts are made at once; None: any number."""
        return None

    def batches(self, inputs: Sequence[MrcInput], n_candidates: int) -> Sequence[Batch]:
        """Return batches that hold every input once, meant for populations of ``n_candidates``.

        Raises UsageError for inputs that have more tokens than the backbone has positions.
        """
        if inputs:
            longest = max(len(x.input_ids) for x in inputs)
            check_positions(longest, self.n_inline, self._max_positions)
        return self._batches(inputs, n_candidates)

    def pieces(self, n_candidates: int, batch: Batch) -> list[slice]:
        """Return even slices of the candidates, each within the tokens of a micro-batch."""
        at_most = max(1, self.micro_batch_tokens // batch.n_tokens)
        parts = even_parts(n_candidates, at_most)
        self._largest = max(self._largest, batch.n_tokens * min(at_most, n_candidates))
        return parts

    def set_incumbent(self, z: torch.Tensor) -> None:
        """Take ``z`` [L', d]; nothing is computed before the next evaluation."""
        self.incumbent = z
        self.cache.clear()
        self._stale = set(range(self.n_layers)) if self.prefixed else set()

    def commit(self, layer: int, z: torch.Tensor) -> None:
        """Take ``z`` [d] at ``layer``; inputs of the layers above are void."""
        assert self.incumbent is not None
        self.incumbent[layer] = z
        self.cache.drop_above(layer)
        if self.prefixed and layer < self.n_layers:
            self._stale.add(layer)

    def within_memory(self, attempt: Callable[[], T], longest: int) -> T:
        """Return ``attempt()``, repeated with less memory as often as memory runs out.

        First what is cached is given back, then runs that share the device take turns, then batches are
        halved and stay so. ``longest`` is the tokens of the longest example.

        Raises OutOfMemoryError if one example does not fit.
        """
        longest += self.n_inline
        while True:
            try:
                with torch.inference_mode(), self.queue():
                    for layer in sorted(self._stale):
                        assert self.incumbent is not None
                        self._hold(layer, self.incumbent[layer : layer + 1])
                        self._stale.discard(layer)
                    return attempt()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if not (self.cache.n_bytes or self._shares() or self.micro_batch_tokens > longest):
                    raise OutOfMemoryError(
                        f"one example of {longest - self.n_inline} tokens does not fit the memory of "
                        f"{self.backend.device} with runtime '{self.backend.name}'; "
                        "shorten the examples (--max-tokens) or use another device"
                    ) from error
            self._take_less(longest)  # only now: the error kept alive what had been computed

    def forget(self) -> None:
        """Drop what can be made again; batches that were made are void."""
        self.generation += 1
        self.cache.clear()

    def _take_less(self, longest: int) -> None:
        if not self.cache.give_back() and not self._stop_sharing():
            tried = min(self.micro_batch_tokens, self._largest or self.micro_batch_tokens)
            self.micro_batch_tokens = max(longest, tried // 2)
            self._largest = 0
            self.forget()
        self._free_memory()

    def _shares(self) -> bool:
        """Tell whether other runs compute beside this one."""
        return False

    def _stop_sharing(self) -> bool:
        return False

    def _free_memory(self) -> None:  # noqa: B027 - most have none to give back
        """Give back what an allocator keeps."""


def even_parts(total: int, at_most: int) -> list[slice]:
    """Cut ``total`` things into the fewest parts of even size of at most ``at_most``."""
    n_parts = -(-total // at_most)
    return [slice(total * k // n_parts, total * (k + 1) // n_parts) for k in range(n_parts)]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether ``error`` is some backend's way of saying that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator, onnxruntime's arena and its own exceptions are RuntimeErrors (or bare
    # Exceptions) that only their text tells apart
    if isinstance(error, Mp2Error):
        return False
    text = str(error).lower()
    return any(
        phrase in text
        for phrase in (
            "out of memory",
            "status_alloc_failed",  # cuBLAS, cuDNN
            "allocation_failed",  # cuDNN 9
            "not enough memory",
            "can't allocate memory",
            "failed to allocate memory",
            "bad_alloc",
            "bad allocation",
        )
    )


def check_positions(n_tokens: int, n_inline: int, most: int) -> None:
    """Raise ``UsageError`` where a sequence and its inline prompt rows need more than ``most`` positions."""
    if n_tokens + n_inline > most:
        raise UsageError(
            f"sequence of {n_tokens} tokens and {n_inline} inline prompt rows, expected at most "
            f"{most} positions; shorten the examples"
        )


def say(line: str) -> None:
    """Print a line of a backend's log."""
    print(f"mp2: {line}", file=sys.stderr, flush=True)

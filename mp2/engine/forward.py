"""What a backend computes for one set of prompts, read by one head; the parts that are the same everywhere.

`Forward` is what backends subclass. It keeps the incumbent (the prompt that visits of a layer start from),
the inputs of layers that follow from it, and what happens when memory runs out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from mp2.engine.backend import Backend, is_out_of_memory
from mp2.errors import OutOfMemoryError, UsageError
from mp2.heads import Head, SpanHead

if TYPE_CHECKING:
    from mp2.prompts import PromptSet
    from mp2.tasks import MrcInput

B = TypeVar("B", bound=Hashable)  # a batch
T = TypeVar("T")
U = TypeVar("U")

Arrival = Callable[[], np.ndarray]
"""Waits for a result on its way to the host, and returns it; once, from any thread."""


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


class Evaluation(Protocol):
    """A population, ready to be evaluated over batches."""

    def __call__(self, batch: Batch, candidates: slice, *, again: bool = True) -> Arrival:
        """Begin the head's outputs [p, n, ...] (p may be 1 where nothing differs) of some ``candidates``.

        ``again``: the same batch will come again, so that recording what it needs may pay.
        """
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
        """Raises UsageError for deep inline prompts where the backend has prefixes only."""
        backbone = backend.backbone
        prompts.check_fits(backbone)
        if prompts.kind == "deep" and prompts.meta.injection != "prefix" and not backend.deep_inline:
            raise UsageError(
                f"these deep prompts were trained with inline injection, runtime '{backend.name}' on "
                f"{backend.device} has prefixes only: run them with --runtime torch --device cpu, or give "
                "prompts trained with --injection prefix"
            )
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

    def intrinsic(self, z: np.ndarray, shape: str) -> torch.Tensor:
        """Return intrinsic prompts ``z`` as float32; UsageError unless of ``shape``, as "P L' d"."""
        sizes = {"L'": self.prompts.z.shape[0], "d": self.prompts.z.shape[-1]}
        wanted = [sizes.get(name, name) for name in shape.split()]
        got = tuple(np.shape(z))
        if len(got) != len(wanted) or any(w not in (g, "P") for w, g in zip(wanted, got, strict=True)):
            raise UsageError(
                f"intrinsic prompts z have shape {got}, expected ({', '.join(map(str, wanted))})"
            )
        return torch.from_numpy(np.ascontiguousarray(z, dtype=np.float32))

    @abstractmethod
    def _batches(self, inputs: Sequence[MrcInput], n_candidates: int) -> Sequence[Batch]: ...

    @abstractmethod
    def every_layer(self, z: torch.Tensor, *, scoring: bool = False) -> Evaluation:
        """Return the evaluation of candidates ``z`` [P, L', d] through all layers.

        Outputs are the head's for training, or those for ``scoring``.
        """

    @abstractmethod
    def visit(self, layer: int, z: torch.Tensor) -> Evaluation:
        """Return the evaluation, from cached inputs, of candidates that have ``z`` [P, d] at ``layer``.

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


class ActivationCache(Generic[B]):
    """Inputs of layers, by batch, grown upwards one layer at a time.

    The text's hidden states at layer l depend only on prompts of layers below l, so changing layer l's
    prompt leaves the inputs of layers 0..l valid. As many layers' inputs are kept as ``limit_bytes``
    allows for all batches together, of each the highest first; a visit further down starts again from the
    nearest one kept, or from the embedding.
    """

    def __init__(
        self,
        advance: Callable[[B, int, torch.Tensor], torch.Tensor],
        embed: Callable[[B], torch.Tensor],
        limit_bytes: int,
    ) -> None:
        """``advance(batch, layer, input)`` runs one layer, ``embed(batch)`` is the input of layer 0."""
        self._advance = advance
        self._embed = embed
        self._limit_bytes = limit_bytes
        self._inputs: dict[B, dict[int, torch.Tensor]] = {}  # batch -> layer -> [1, ..., H]
        self._n_bytes = 0

    @property
    def n_bytes(self) -> int:
        """Bytes that are held."""
        return self._n_bytes

    def at(self, batch: B, layer: int) -> torch.Tensor:
        """Return the input of ``layer`` [1, ..., H]."""
        kept = self._inputs.setdefault(batch, {})
        below = [level for level in kept if level <= layer]
        level = max(below, default=0)
        hidden = kept[level] if below else self._keep(batch, 0, self._embed(batch))
        while level < layer:
            hidden = self._advance(batch, level, hidden)
            level += 1
            self._keep(batch, level, hidden)
        return hidden

    def give_back(self) -> bool:
        """Forget everything, as memory ran out, and hold half as much from now on; False: it was nothing."""
        if not self._n_bytes:
            return False
        self._limit_bytes = min(self._limit_bytes, self._n_bytes // 2)
        self.clear()
        return True

    def drop_above(self, layer: int) -> None:
        """Forget the inputs of the layers above ``layer``, whose prompt has changed."""
        for kept in self._inputs.values():
            for level in [x for x in kept if x > layer]:
                self._n_bytes -= kept.pop(level).nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._inputs.clear()
        self._n_bytes = 0

    def _keep(self, batch: B, level: int, hidden: torch.Tensor) -> torch.Tensor:
        self._inputs.setdefault(batch, {})[level] = hidden
        self._n_bytes += hidden.nbytes
        while self._n_bytes > self._limit_bytes:
            held = [
                (len(kept) == 1, x, n, b) for n, (b, kept) in enumerate(self._inputs.items()) for x in kept
            ]
            # a batch's only input last, what was kept just now after all others
            *_, low, _, other = min(held, key=lambda e: ((e[3], e[1]) == (batch, level), *e[:3]))
            self._n_bytes -= self._inputs[other].pop(low).nbytes
        return hidden


def even_parts(total: int, at_most: int) -> list[slice]:
    """Cut ``total`` things into the fewest parts of even size of at most ``at_most``."""
    n_parts = -(-total // at_most)
    return [slice(total * k // n_parts, total * (k + 1) // n_parts) for k in range(n_parts)]


def check_positions(n_tokens: int, n_inline: int, most: int) -> None:
    """Raise ``UsageError`` where a sequence and its inline prompt rows need more than ``most`` positions."""
    if n_tokens + n_inline > most:
        raise UsageError(
            f"sequence of {n_tokens} tokens and {n_inline} inline prompt rows, expected at most "
            f"{most} positions; shorten the examples"
        )

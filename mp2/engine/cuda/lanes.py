"""Lanes: where the evaluations of several runs go side by side on one GPU.

A lane is a CUDA stream with a memory pool for the graphs recorded on it. What is put on one lane is done in
order, so objectives on it may share that memory; lanes do not wait for each other, so kernels of a run that
leave the device half empty run beside another's. An objective is on one lane at a time, and nothing that it
writes is seen by an objective of another: its buffers are its own, graphs of different lanes have different
pools, and a graph is captured on the lane's own stream, because cuBLAS has a workspace for each stream and a
graph keeps the one it was captured with. Weights, folded projections and spans are shared and only read;
they are complete before a second lane can see them (`CudaBackend.settle`).

Kernels have the shapes they have on one lane, so losses do not depend on how many lanes there are (cuBLAS
promises that only where each stream has a workspace of its own, which torch gives it). Only memory does;
where it runs out, `Lanes.merge` goes back to one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
import torch

from mp2.engine.cuda.replays import Capture, CudaCapture
from mp2.messages import say

Arrival = Callable[[], "np.ndarray"]
"""Waits for a tensor that is on its way to the host, and returns a copy of it; callable from any thread."""

_SMALLEST_BLOCK = 1 << 12  # bytes of pinned memory


class Lane(Protocol):
    """A queue of the device. All but what `send` returns is called in one thread."""

    record: Capture | None  # None: nothing is recorded

    def queue(self) -> AbstractContextManager[Any]:
        """Inside, work goes to this lane."""
        ...

    def upload(self, x: torch.Tensor) -> torch.Tensor:
        """Return host tensor ``x`` on the device; its copying is queued, not waited for."""
        ...

    def send(self, x: torch.Tensor) -> Arrival:
        """Queue the copying of device tensor ``x`` to the host; ``x`` may be overwritten by later work."""
        ...


class HostLane:
    """The CPU: everything is done at once."""

    record: Capture | None = None

    def queue(self) -> AbstractContextManager[Any]:
        """See `Lane.queue`."""
        return nullcontext()

    def upload(self, x: torch.Tensor) -> torch.Tensor:
        """See `Lane.upload`."""
        return x

    def send(self, x: torch.Tensor) -> Arrival:
        """See `Lane.send`."""
        found = x.numpy().copy()
        return lambda: found


class CudaLane:
    """A CUDA stream of its own.

    Pinned memory for what is sent belongs to the lane and is given back to it: freeing it would touch the
    stream from a run's thread, perhaps in the middle of a capture.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._blocks: list[torch.Tensor] = []  # pinned, not in use
        self.record: Capture | None = CudaCapture(device, self._stream)

    def queue(self) -> AbstractContextManager[Any]:
        """See `Lane.queue`."""
        return torch.cuda.stream(self._stream)

    def upload(self, x: torch.Tensor) -> torch.Tensor:
        """See `Lane.upload`; from pageable memory a copy would wait for all that the lane has to do."""
        return x.pin_memory().to(self._device, non_blocking=True)

    def send(self, x: torch.Tensor) -> Arrival:
        """See `Lane.send`."""
        block = self._block(x.nbytes)
        host = block[: x.nbytes].view(x.dtype).view(x.shape)
        host.copy_(x, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(self._stream)  # type: ignore[no-untyped-call]

        def arrive() -> np.ndarray:
            with torch.cuda.device(self._device):
                done.synchronize()  # type: ignore[no-untyped-call]
            found = host.numpy().copy()
            self._blocks.append(block)
            return found

        return arrive

    def _block(self, n_bytes: int) -> torch.Tensor:
        """Return pinned memory of at least ``n_bytes``, sizes in powers of two."""
        for k, block in enumerate(self._blocks):
            if block.nbytes >= n_bytes:
                return self._blocks.pop(k)
        size = max(_SMALLEST_BLOCK, 1 << (n_bytes - 1).bit_length())
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class Member(Protocol):
    """What works on a lane."""

    def leave_lane(self) -> None:
        """Forget the lane and all that lies in its memory."""
        ...


class Lanes:
    """The lanes of a backend; one, unless `spread` allows more. Used by one thread."""

    def __init__(
        self, make: Callable[[], Lane], free_memory: Callable[[], None], note: Callable[[str], None] = say
    ) -> None:
        """``free_memory`` waits for the device and gives back what its allocator keeps; ``note``: a log."""
        self._make, self._free_memory, self._note = make, free_memory, note
        self._lanes: list[tuple[Lane, WeakSet[Any]]] = []
        self._most = 1

    @property
    def n_lanes(self) -> int:
        """Lanes in use."""
        return len(self._lanes)

    def spread(self, n_lanes: int) -> None:
        """Let members that come from now on have up to ``n_lanes`` lanes."""
        self._most = n_lanes

    def take(self, member: Member) -> Lane:
        """Put ``member`` on the lane with the fewest (alive) of them, on a new one if that is allowed."""
        fewest = min(self._lanes, key=lambda pair: len(pair[1]), default=None)
        if fewest is None or (fewest[1] and len(self._lanes) < self._most):
            fewest = (self._make(), WeakSet())
            self._lanes.append(fewest)
        fewest[1].add(member)
        return fewest[0]

    def merge(self) -> bool:
        """After memory ran out: go back to one lane for good; False where there was no other."""
        if len(self._lanes) < 2:
            return False
        self._note(f"out of memory with {len(self._lanes)} runs side by side; from here on one after another")
        self._most = 1
        self._free_memory()  # first of all it waits: what is under way needs its memory
        for _, members in self._lanes:
            for member in list(members):
                member.leave_lane()
        del self._lanes[1:]
        self._lanes[0][1].clear()
        self._free_memory()
        return True

    def free_memory(self) -> None:
        """Wait for the device and give back what its allocator keeps."""
        self._free_memory()

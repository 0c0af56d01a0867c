"""The processes of one training run, as ``torchrun`` starts them, or just this one.

::

    with joined("cuda") as ranks:          # inside every process
        model = ranks.wrap(module)         # DistributedDataParallel where there are several

Several processes work on one global batch; every process holds all parameters and takes the same steps. Only
``ranks.main`` writes files.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from mp2.backbone.device import resolve_device
from mp2.errors import UsageError

_TIMEOUT = timedelta(hours=2)  # the others may wait for one process to format or to score data
_RELEASE_S = 10.0
_reduced: deque[weakref.ref[torch.Tensor]] = deque(maxlen=64)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process's number, how many there are, and the device it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` itself, or in ``DistributedDataParallel``: gradients are averaged over processes."""
        if self.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)

    def total(self, *values: float) -> list[float]:
        """Sums over the processes; every process must call it, and all get the same numbers."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        _reduced.append(weakref.ref(tensor))
        return [float(x) for x in tensor.tolist()]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process, then in the others (who find what it wrote)."""
        if not self.main:
            self.total(0.0)
        yield
        if self.main:
            self.total(0.0)


def is_main() -> bool:
    """Whether this process is the one that writes and prints, whether or not the run has begun."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the run that ``torchrun`` started (gloo on CPUs, nccl on GPUs), or be the only process.

    With several processes ``cuda`` means a GPU for each.

    Raises:
        UnknownNameError, MissingDependencyError: no such device here.
        UsageError: several processes, but one numbered GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(device=resolve_device(device))
        return
    where = resolve_device(device)
    if where.type == "cuda":
        if where.index is not None:
            raise UsageError(f"--device {device} with {size} processes, expected 'cuda': a GPU for each")
        where = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), size, where)
    except SystemExit:  # stopped by a signal, all of them at the same step
        _leave()
        raise
    _leave()  # not after an error: the others would be waited for


def _leave() -> None:
    """Destroy the process group, once gloo's threads have let go of all tensors.

    They drop their references only some time after a call, and need the interpreter's lock for it; whoever
    frees the group waits for these threads and may hold that lock: a deadlock.
    """
    give_up = time.monotonic() + _RELEASE_S
    while any(tensor() is not None for tensor in _reduced) and time.monotonic() < give_up:
        time.sleep(0.001)
    dist.destroy_process_group()

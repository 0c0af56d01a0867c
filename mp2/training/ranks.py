"""The processes of one training run, as ``torchrun`` starts them, or just this one.

::

    with joined("cuda") as ranks:          # inside every process
        model = ranks.wrap(module)         # DistributedDataParallel where there are several

Several processes work on one global batch; every process holds all parameters and takes the same steps. Only
``ranks.main`` writes files. Where one process ends early, the others notice by the closed connection (gloo)
and end too, with ``LostProcessError``; the run goes on from its checkpoint when it is started again. A signal
to any of them is taken as one to all (:class:`StopSignals`): they finish the step, save and leave.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from mp2.backbone.device import resolve_device
from mp2.errors import LostProcessError, UsageError

JOIN_TIMEOUT = timedelta(minutes=10)  # for all processes to be there
_TIMEOUT = timedelta(hours=2)  # the others may wait for one process to format or to score data
_RELEASE_S = 10.0
_RELEASE_AFTER_LOSS_S = 0.5
_exchanged: deque[weakref.ref[Tensor]] = deque(maxlen=64)
_left: list[dist.ProcessGroup] = []  # see ``_leave``
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
        _exchanged.append(weakref.ref(tensor))
        with self.together():
            dist.all_reduce(tensor)
        return [float(x) for x in tensor.tolist()]

    def share(self, tensor: Tensor) -> None:
        """Put the main process's numbers into every process's ``tensor``; every process must call it."""
        if self.size == 1:
            return
        sent = tensor.detach().clone()  # its own: see ``_let_go``
        _exchanged.append(weakref.ref(sent))
        with self.together():
            dist.broadcast(sent, src=0)
        with torch.no_grad():
            tensor.copy_(sent)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block in which processes exchange numbers.

        Raises:
            LostProcessError: another process ended, or did not answer in time.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_loss(error):
                raise
            raise LostProcessError(
                f"another of the {self.size} processes of this run ended ({_first_line(error)}); "
                "the same command goes on from the last checkpoint"
            ) from error

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
    with _all_of(size):
        store, rank, size = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT,
        )
    try:
        yield Ranks(rank, size, where)
    except SystemExit:  # stopped by a signal, all of them at the same step
        _leave()
        raise
    except BaseException:  # no goodbye after an error: the others would be waited for
        _let_go(_RELEASE_AFTER_LOSS_S)
        raise
    _leave()


@contextmanager
def _all_of(size: int) -> Iterator[None]:
    """Say so where not all processes come."""
    try:
        yield
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise LostProcessError(
            f"not all of the {size} processes of this run came within {JOIN_TIMEOUT} ({_first_line(error)}); "
            "start all of them again"
        ) from error


def _is_loss(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone: gloo's are plain ``RuntimeError``."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _first_line(error: RuntimeError) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _leave() -> None:
    """Destroy the process group, once gloo's threads have let go of all tensors.

    Its last owner ends these threads. DistributedDataParallel does that with the interpreter's lock held,
    torch's Python object does not; so one is kept here, which outlives the model.
    """
    _let_go(_RELEASE_S)
    _left.append(dist.distributed_c10d._get_default_group())  # type: ignore[no-untyped-call]
    dist.destroy_process_group()


def _let_go(seconds: float) -> None:
    """Wait until gloo's threads have let go of all tensors, at most so long.

    They drop their references only some time after a call, and need the interpreter's lock for it; whoever
    frees the group waits for these threads and may hold that lock: a deadlock.
    """
    give_up = time.monotonic() + seconds
    while any(tensor() is not None for tensor in _exchanged) and time.monotonic() < give_up:
        time.sleep(0.001)


SAME_S = 1.0


def _hangup() -> list[int]:
    """SIGHUP, where there is one and ``nohup`` does not have it ignored."""
    number = getattr(signal, "SIGHUP", None)
    return [] if number is None or signal.getsignal(number) is signal.SIG_IGN else [number]


class StopSignals:
    """While entered, SIGINT, SIGTERM and SIGHUP only set ``received``; a second one acts as usual.

    What comes within a second of the first is the same one: whoever stops a group of processes tells torchrun
    and each of its processes, and torchrun then tells them again.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, *_hangup()):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def receive(self, number: int) -> None:
        """Take a signal as received, unless there was one."""
        if self.received is None:
            self.received, self._at = number, time.monotonic()

    def leave(self) -> None:
        """Exit with the status of a process ended by the received signal, if there was one."""
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and time.monotonic() - self._at > SAME_S:
            self._restore()
            signal.raise_signal(number)
        self.receive(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

"""The loop that backbone and prompt training share: steps, journal, checkpoints, progress, stopping.

Every random draw of step s comes from a generator seeded with (seed, s), and a checkpoint holds parameters,
Adam's moments and counters: so a run killed anywhere and started again takes the steps that the unbroken run
would have taken, bit for bit on one CPU process.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import torch
from torch import Tensor, nn

from mp2.errors import FormatError, LossError, LostProcessError, MismatchError
from mp2.files import open_to_append, write_all
from mp2.journal_lines import journal_line
from mp2.json_files import parse_json
from mp2.runs.loggers.tensorboard import Scalars
from mp2.runs.progress import clock
from mp2.training.checkpoint import checkpoint_state, cut_back, load_checkpoint, save_checkpoint
from mp2.training.prefetch import Prefetcher
from mp2.training.ranks import Ranks, StopSignals

MAX_SKIPPED_IN_A_ROW = 10
SCALARS_EVERY = 10  # steps; TensorBoard gets the mean loss of as many
_LINE_EVERY_S = 20.0
T = TypeVar("T")


class Trainer(ABC, Generic[T]):
    """One training run in one folder; a subclass says what a batch, its loss and its rates are.

    It also sets ``model`` (what a checkpoint holds) and ``optimizer``. With several processes all of them run
    the same loop on their parts of each batch; the main one writes.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        out: Path,
        *,
        n_steps: int,
        checkpoint: str,
        journal: str,
        checkpoint_minutes: float,
        amount: int,
        unit: str,
        ranks: Ranks,
        log: Callable[[str], None],
    ) -> None:
        """Prepare ``n_steps`` steps in the folder ``out``, each over ``amount`` of ``unit``."""
        self.out, self.n_steps, self.ranks, self.log = out, n_steps, ranks, log
        self.checkpoint, self.journal = out / checkpoint, out / journal
        self.step = self.skipped = self.in_a_row = 0
        self.seconds = self.waited_s = 0.0  # in steps, waiting for data included; of resumed sessions too
        self.scalars: Scalars | None = None
        self._minutes, self._pace = checkpoint_minutes, (amount, unit)
        self._stop, self._stopping = StopSignals(), False

    @abstractmethod
    def make_batch(self, step: int) -> T:
        """This process's part of a step's batch. Called by another thread: must depend on the step alone."""

    @abstractmethod
    def loss(self, batch: T) -> Tensor:
        """This process's share of the batch's mean loss: summed over the processes it is that mean."""

    @abstractmethod
    def clip(self) -> Tensor:
        """Limit the gradients where the recipe does; returns the norm of all of them."""

    @abstractmethod
    def rates(self) -> Sequence[float]:
        """Learning rate of each parameter group at the present step."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed (JSON)."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the counters (JSON)."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state`` gave."""

    def notes(self, batch: T) -> dict[str, Any]:
        """What the journal line of a batch says beside step and loss (JSON)."""
        return {}

    def after_step(self) -> None:
        """Do what the run wants done between a step and its checkpoint."""

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        counters = {
            name: getattr(self, name) for name in ("step", "skipped", "in_a_row", "seconds", "waited_s")
        }
        save_checkpoint(
            self.checkpoint,
            self.model,
            self.optimizer,
            {**counters, **self.state(), "settings": self.settings()},
        )

    def resume(self) -> bool:
        """Go back to the folder's checkpoint if there is one.

        Raises:
            FormatError: damaged, or of a model of another shape.
            MismatchError: made with other settings; the message names them.
        """
        if not self.checkpoint.is_file():
            return False
        state = checkpoint_state(self.checkpoint)
        if state["step"] > self.n_steps:
            raise FormatError(
                f"is {state['step']}, expected at most {self.n_steps}, the run's steps",
                path=self.checkpoint,
                field="step",
            )
        before, now = state["settings"], parse_json(json.dumps(self.settings()))
        if before != now:
            old = before if isinstance(before, dict) else {}
            differ = [name for name in {**old, **now} if old.get(name) != now.get(name)]
            raise MismatchError(
                f"{self.checkpoint} was made with other settings, data or backbone: {', '.join(differ)}; "
                "give the same ones, or another --out"
            )
        self.take(self.checkpoint)
        return True

    def take(self, checkpoint: Path) -> None:
        """Set parameters, moments and counters to a checkpoint's, whatever the settings it was made with.

        Raises:
            FormatError: damaged, or of a model of another shape.
        """
        state = load_checkpoint(checkpoint, self.model, self.optimizer)
        for name in ("step", "skipped", "in_a_row", "seconds", "waited_s"):
            setattr(self, name, state[name])
        self.restore(state)

    @contextmanager
    def resumed(self) -> Iterator[bool]:
        """Go back to the folder's checkpoint, if there is one (then the value is True), and open the scalars.

        The caller's main process holds the folder's lock. Raises what ``resume`` raises.
        """
        with self.ranks.main_first():  # the main process has the lock before the others look
            resumed = self.resume()
        if resumed:
            self.log(f"resumed at step {self.step}")
        with ExitStack() as stack:
            if self.ranks.main:
                self.scalars = stack.enter_context(Scalars(self.out, self.step, self.log))
            yield resumed

    @property
    def wait_share(self) -> float:
        """Share of the steps' time spent waiting for data, between 0 and 1."""
        return self.waited_s / self.seconds if self.seconds else 0.0

    def train_step(self, batch: T | None = None) -> float:
        """One step; returns its loss. A non-finite loss or gradient is skipped and counted.

        Raises:
            LossError: ten of them in a row.
            LostProcessError: another process ended; nothing of this step was done.
        """
        batch = self.make_batch(self.step) if batch is None else batch
        for group, rate in zip(self.optimizer.param_groups, self.rates(), strict=True):
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with self.ranks.together():
            loss = self.loss(batch)
            (loss * self.ranks.size).backward()  # type: ignore[no-untyped-call]  # DDP averages over processes
        norm = float(self.clip())
        value, n_stopped = self.ranks.total(float(loss.detach()), float(self._stop.received is not None))
        self._stopping = n_stopped > 0  # all processes stop at the same step, whichever was told
        if self._stopping:
            self._stop.receive(signal.SIGTERM)
        if math.isfinite(value) and math.isfinite(norm):
            self.optimizer.step()
            self.in_a_row = 0
        else:
            value = value if not math.isfinite(value) else math.nan
            self.skipped += 1
            self.in_a_row += 1
            if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
                written = self.checkpoint.is_file()
                saved = (
                    f"the last good checkpoint is {self.checkpoint}"
                    if written
                    else "no checkpoint was written yet"
                )
                raise LossError(f"{self.in_a_row} non-finite losses in a row at step {self.step}; {saved}")
        self.step += 1
        return value

    def train(self) -> None:
        """Take the steps that are left; a signal saves a checkpoint and leaves after the present one."""
        main = self.ranks.main
        if main:
            cut_back(self.journal, self.step, range(1, self.step + 1), self.log)
        amount, unit = self._pace
        progress = StepLine(self.step, self.n_steps, self.log, amount, unit)
        last_save = time.monotonic()
        recent: list[float] = []
        with ExitStack() as stack:
            journal = stack.enter_context(open_to_append(self.journal)) if main else None
            self._stop = stack.enter_context(StopSignals())
            batches = stack.enter_context(Prefetcher(self.make_batch, self.step, self.n_steps))
            while self.step < self.n_steps:
                start, waited = time.perf_counter(), batches.waited_s
                batch = batches.next()
                try:
                    value = self.train_step(batch)
                except LostProcessError:
                    if journal is not None:
                        self._save_with(journal)
                    raise
                self.seconds += time.perf_counter() - start
                self.waited_s += batches.waited_s - waited
                if journal is not None:
                    line = {"step": self.step, "loss": value if math.isfinite(value) else None}
                    write_all(journal, journal_line(line | self.notes(batch)))
                    recent.append(value)
                    if self.step % SCALARS_EVERY == 0:
                        if self.scalars is not None:
                            self.scalars.add(self.step, self._scalar_values(recent))
                        recent = []
                    progress.step(self.step, value, self.wait_share)
                self.after_step()
                due = time.monotonic() - last_save > self._minutes * 60 or self.step == self.n_steps
                stopped = self._stopping or (self.ranks.size == 1 and self._stop.received is not None)
                if journal is not None and (due or stopped):
                    self._save_with(journal)
                    last_save = time.monotonic()
                if stopped:
                    self._leave_together()
            if self.ranks.total(float(self._stop.received is not None))[0]:  # told after the last step
                self._leave_together()

    def _save_with(self, journal: BinaryIO) -> None:
        os.fsync(journal.fileno())
        self.save()

    def _leave_together(self) -> None:
        """Exit by the signal that one of the processes received, once the checkpoint is whole.

        torchrun ends all processes as soon as it sees that one has left.
        """
        self._stop.receive(signal.SIGTERM)
        self.ranks.total(0.0)
        self.log(f"stopped at step {self.step}; the same command goes on from there")
        self._stop.leave()

    def _scalar_values(self, losses: Sequence[float]) -> dict[str, float]:
        finite = [x for x in losses if math.isfinite(x)]
        values = {
            "train/loss": sum(finite) / len(finite) if finite else math.nan,
            "train/skipped_steps": float(self.skipped),
            "train/data_wait_share": self.wait_share,
        }
        values |= {f"rate/{g['name']}": float(g["lr"]) for g in self.optimizer.param_groups}
        return values | self.more_scalars()

    def more_scalars(self) -> dict[str, float]:
        """Further TensorBoard scalars of the present step."""
        return {}


class StepLine:
    """A line every 20 seconds and at the end: mean loss since the last one, pace, data wait, time left."""

    def __init__(self, first: int, n_steps: int, log: Callable[[str], None], amount: int, unit: str) -> None:
        """Start at step ``first`` of ``n_steps``; a step handles ``amount`` of ``unit``."""
        self._first, self._n_steps, self._log = first, n_steps, log
        self._amount, self._unit = amount, unit
        self._start = self._last = time.monotonic()
        self._losses: list[float] = []

    def step(self, step: int, loss: float, wait_share: float) -> None:
        """Count a step; non-finite losses are left out of the mean."""
        if math.isfinite(loss):
            self._losses.append(loss)
        now = time.monotonic()
        if now - self._last <= _LINE_EVERY_S and step < self._n_steps:
            return
        pace = (step - self._first) / max(1e-9, now - self._start)
        mean = sum(self._losses) / len(self._losses) if self._losses else math.nan
        shown = f"{mean:.4f}" if self._losses else "-"
        self._log(
            f"step {step}/{self._n_steps} loss {shown} {pace:.2f} steps/s "
            f"{pace * self._amount:,.0f} {self._unit}/s "
            f"data wait {100 * wait_share:.1f} % ETA {clock((self._n_steps - step) / pace)}"
        )
        self._losses, self._last = [], now

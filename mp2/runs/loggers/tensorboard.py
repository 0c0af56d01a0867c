"""TensorBoard scalars of a run, in ``<its folder>/tensorboard``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mp2.errors import UsageError
from mp2.files import own_folder
from mp2.optimizers.two_stage import Checkpoint, Progress
from mp2.runs.loggers.logger import Logger, RunStart, finite, of_checkpoint, of_progress, of_result


class Scalars:
    """A writer of scalars to ``<out>/tensorboard``; without the package one line says so."""

    def __init__(self, out: Path, step: int, log: Callable[[str], None]) -> None:
        """Write on from ``step``: scalars of later steps, of a run that was killed, are hidden."""
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log("no TensorBoard scalars: the package is not installed (pip install 'mp2[train]')")
            return
        try:
            str(out.absolute()).encode("utf-8")
        except UnicodeEncodeError:
            log("no TensorBoard scalars: the package opens no path whose name is not UTF-8")
            return
        folder = out / "tensorboard"
        try:
            own_folder(folder)
        except UsageError as error:
            log(f"no TensorBoard scalars: {error}")
            return
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)  # type: ignore[no-untyped-call]

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars of a step; non-finite ones are left out."""
        if self._writer is not None:
            for name, value in finite(values).items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Scalars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorBoardLogger(Logger):
    """Writes a run's scalars; a resumed run's again from its first iteration: each is shown once."""

    def __init__(self) -> None:
        self._scalars: Scalars | None = None
        self._iteration = 0

    def start(self, run: RunStart) -> None:
        """Open the file; scalars of an earlier session are hidden, the replay writes them again."""
        self._scalars = Scalars(run.run_dir, 0, lambda line: None)

    def iteration(self, progress: Progress) -> None:
        """Write the losses."""
        self._add(progress.iteration, of_progress(progress))

    def checkpoint(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Write the score."""
        self._add(progress.iteration, of_checkpoint(checkpoint))

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Write the final scores and close."""
        if result is not None:
            self._add(self._iteration, of_result(result))
        if self._scalars is not None:
            self._scalars.close()

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        assert self._scalars is not None
        self._iteration = step
        self._scalars.add(step, values)

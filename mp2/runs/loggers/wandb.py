"""A run in Weights & Biases: its config, metrics, final scores.

Offline unless ``WANDB_MODE`` says otherwise: the run lies in ``<its folder>/wandb``, and ``wandb sync`` sends
it. A resumed run goes on under its id, which ``wandb.json`` in its folder keeps.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

from mp2.errors import FormatError
from mp2.files import own_folder, write_json
from mp2.json_files import Fields, check, one_line, read_object
from mp2.optimizers.two_stage import Checkpoint, Progress
from mp2.runs.loggers.logger import Logger, RunStart, of_checkpoint, of_progress, of_result

PROJECT = "mp2"  # WANDB_PROJECT names another


class WandbLogger(Logger):
    """Sends a run to Weights & Biases, or to its files."""

    def __init__(self) -> None:
        self._run: Any = None
        self._known = False  # earlier sessions of the run have logged what is replayed

    def start(self, run: RunStart) -> None:
        """Create the run, or go on with that of an earlier session."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb

        kept = run.run_dir / "wandb.json"
        try:
            number = check(read_object(kept), Fields({"id": one_line}), kept)["id"]
            self._known = True
        except FormatError:
            number = secrets.token_hex(4)
            write_json(kept, {"id": number})
        own_folder(run.run_dir / "wandb")
        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=number,
            name=run.run_dir.name,
            group=f"{run.task}-{run.method}",
            config=dict(run.config),
            dir=str(run.run_dir),
            mode=mode,
            resume="allow",
            reinit="create_new",  # several runs are under way at once
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )

    def iteration(self, progress: Progress) -> None:
        """Send the losses."""
        self._add(progress, of_progress(progress))

    def checkpoint(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Send the score."""
        self._add(progress, of_checkpoint(checkpoint))

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Send the final scores; a stopped run is marked as failed."""
        if result is not None:
            self._run.summary.update(of_result(result))
        self._run.finish(exit_code=0 if result is not None else 1)

    def _add(self, progress: Progress, values: Mapping[str, float]) -> None:
        if progress.live or not self._known:
            self._run.log(dict(values), step=progress.iteration)

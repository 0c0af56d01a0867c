"""``mp2 pretrain-backbone --from``: a run that goes on where another one is, with settings of its own.

A run at a constant rate does not end; what is to be used is a branch of it whose rate decays to zero (Hu et
al., 2024, MiniCPM, section 4). Later stages, with other losses or longer sequences, are branches too.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mp2.errors import MismatchError, UsageError
from mp2.files import whole_file
from mp2.training.checkpoint import checkpoint_state, cut_back

if TYPE_CHECKING:
    from mp2.training.mlm_trainer import MlmTrainer


def check_start(run: MlmTrainer, start: Path) -> None:
    """Raise where ``run`` cannot begin as a branch of the run in the folder ``start``.

    Raises:
        UsageError: no checkpoint there, or no step left to take.
        MismatchError: it has another vocabulary.
    """
    path = start / run.checkpoint.name
    if not path.is_file():
        raise UsageError(f"--from: there is no {path}; give the --out folder of a run that has begun")
    state = checkpoint_state(path)
    if state["step"] >= run.n_steps:
        raise UsageError(
            f"--steps {run.n_steps}, expected more than the {state['step']} that the run in {start} has taken"
        )
    if state["settings"]["vocabulary"] != run.settings()["vocabulary"]:
        raise MismatchError(f"the run in {start} has another vocabulary than this --corpus gives")


def branch(run: MlmTrainer, start: Path) -> None:
    """Give ``run`` the weights, moments, counters and journal of the run in ``start``, which may be going on.

    Raises:
        FormatError: a damaged checkpoint, or one of a model of another shape.
    """
    copy = run.out / "start.safetensors"  # the other run may replace its own while we read
    with run.ranks.main_first():
        if run.ranks.main:
            try:
                with whole_file(copy) as partial:
                    shutil.copyfile(start / run.checkpoint.name, partial)
                run.take(copy)
            finally:
                copy.unlink(missing_ok=True)
            with whole_file(run.journal) as partial:  # the other run may be writing a line
                shutil.copyfile(start / run.journal.name, partial)
            cut_back(run.journal, run.step, (), run.log)
            run.save()
        else:
            run.resume()
    run.log(f"branched at step {run.step} of the run in {start}")

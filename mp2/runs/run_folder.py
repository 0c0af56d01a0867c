"""The run folder: made, locked, its config read back."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mp2.errors import Mp2Error, UsageError
from mp2.folder_lock import folder_lock
from mp2.json_files import Fields, anything, check, one_of, read_object
from mp2.runs.config import SCHEMA_VERSION, BbtConfig

OWN_BACKBONE = "backbone"  # the folder of a backbone that a run tuned: that of model tuning
OWN_PROMPTS = "prompts.safetensors"  # modular prompts that a run made itself: those of ``mp2 tune``


_CONFIG = Fields({"schema_version": one_of(SCHEMA_VERSION), "config": anything})


def read_config(run_dir: Path) -> BbtConfig:
    """The config of a run folder; prompts that lie in it are found there, wherever the folder is now."""
    path = run_dir / "config.json"
    if not run_dir.is_dir():
        raise UsageError(f"there is no folder {run_dir}, expected the folder of a run")
    if not path.exists():
        runs = sorted(config.parent for config in run_dir.glob("*/config.json"))
        names = ", ".join(map(str, runs[:3])) + (" ..." if len(runs) > 3 else "")
        hint = f"; runs in it: {names}" if runs else ""
        raise UsageError(f"{run_dir} is not a run folder: there is no config.json in it{hint}")
    values = check(read_object(path), _CONFIG, path)
    config = BbtConfig.from_json(values["config"], path)
    own, backbone = run_dir / OWN_PROMPTS, run_dir / OWN_BACKBONE
    if backbone.is_dir():
        config = replace(config, backbone=str(backbone.resolve()), revision=None)
    return replace(config, prompts=str(own.resolve())) if own.is_file() else config


def begun_head(run_dir: Path) -> tuple[str, str] | None:
    """Kind and reason of the head in a run's ``config.json``; None where an older version wrote it."""
    head: Any = read_object(run_dir / "config.json").get("head")
    try:
        return str(head["kind"]), str(head["reason"])
    except (TypeError, KeyError):
        return None


def resume_command(*run_dirs: Path) -> str:
    """What to type to go on, in a shell."""
    return " ".join(["mp2 bbt", *(f"--resume {shlex.quote(str(run_dir))}" for run_dir in run_dirs)])


def how_to_end(run_dir: Path) -> str:
    """What writes the files that a run leaves at its end, where one is missing or damaged."""
    if (run_dir / "tune.json").exists():
        return "a run of mp2 tune keeps nothing to make it from: tune again"
    return f"make it from the run's journal: {resume_command(run_dir)}"


def new_folder(out: Path, name: str) -> Path:
    """Make the folder ``out/name-<stamp>``; a number is put after the stamp where that is taken."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        run_dir = out / (f"{name}-{stamp}" + (f"-{attempt}" if attempt else ""))
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(
                f"cannot make the run folder {run_dir}: {error.strerror}; give another --out"
            ) from error
        return run_dir
    raise UsageError(f"1000 runs named {name}-{stamp} are in {out} already; give another --out")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder's lock; the system drops it with the process, however that ends."""
    with folder_lock(
        run_dir, f"another process works in {run_dir}; wait for it, or stop it and resume the run"
    ):
        yield


@contextmanager
def says_how_to_go_on(run_dir: Path) -> Iterator[None]:
    """A full disk at the very end loses nothing either: the journal is whole."""
    try:
        yield
    except OSError as error:
        raise Mp2Error(
            f"cannot write {error.filename or run_dir}: {error.strerror or error}. All iterations are "
            f"journaled: make room, then write the results with: {resume_command(run_dir)}"
        ) from error

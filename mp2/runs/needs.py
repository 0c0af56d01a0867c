"""What a run needs beside its folder: backbone, modular prompts, an engine folder; to be resumed, its data.

They are not copied: prompts of a large backbone take a gigabyte. ``config.json`` says where the run found
them, of a hub backbone the commit; hashes say whether what is found now is the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from mp2.backbone.load import EMBEDDED as BACKBONES
from mp2.errors import UsageError
from mp2.json_files import read_object
from mp2.prompts.prompt_set import EMBEDDED as PROMPTS
from mp2.runs.config import BbtConfig
from mp2.runs.run_folder import OWN_BACKBONE, OWN_PROMPTS
from mp2.runs.scratch import ON_THE_FLY

NEEDS = {
    "backbone": "the backbone",
    "prompts": "the modular prompts",
    "engine": "the engine folder",
    "data": "the data",
}
MOVED = (*NEEDS, "revision")
"""Options that say where it is now."""


def located(
    run_dir: Path,
    config: BbtConfig,
    moved: Mapping[str, str | None],
    needed: Collection[str] = ("backbone", "prompts", "engine"),
) -> BbtConfig:
    """The run's config with what is ``needed`` where it is now: as ``moved`` says, else where the run had it.

    A hub backbone is the commit that the run found, unless ``moved`` has another backbone or a revision.

    Raises:
        UsageError: something is not there; the message names it, and the option that says where it is.
    """
    given = {name: value for name, value in moved.items() if value is not None}
    for name in needed:
        value = getattr(config, name)
        is_path = value is not None and Path(value).is_absolute()
        if name not in given and is_path and not os.path.exists(value):
            raise UsageError(
                f"{run_dir} needs {NEEDS[name]} {value}, and there is nothing there now; say with --{name} "
                "where it is"
            )
    revision = given.get("revision")
    if revision is None and "backbone" not in given:
        revision = config.revision or _commit(run_dir)
    return replace(
        config,
        revision=revision,
        backbone=given.get("backbone", config.backbone),
        prompts=given.get("prompts", config.prompts),
        engine=given.get("engine", config.engine),
        data=given.get("data", config.data),
    )


def untyped(
    config: BbtConfig,
    moved: Mapping[str, str | None],
    names: Collection[str] = ("backbone", "prompts", "engine"),
) -> dict[str, str | None]:
    """What the run's config says of ``names`` that ``moved`` does not say."""
    return {name: getattr(config, name) for name in names if moved.get(name) is None}


def say_what_it_loads(run_dir: Path, named: Mapping[str, str | None], say: Callable[[str], None]) -> None:
    """Say what is ``named`` by the ``config.json`` of a run and by nobody here: it may be a stranger's.

    What ships with the package or lies in the folder itself is not said.
    """
    ours = {*BACKBONES, *PROMPTS, *ON_THE_FLY}
    own = [str((run_dir / name).resolve()) for name in (OWN_PROMPTS, OWN_BACKBONE)]
    source = f"({run_dir / 'config.json'} says so)"
    for what, name in named.items():
        if name is None or name in ours or name in own:
            continue
        if what == "endpoint":
            say(f"sending texts to {name} {source}")
            continue
        where = "" if os.path.exists(name) else ", which is not on this machine: a name of the hub"
        say(f"loading {what} {name}{where} {source}")


def _commit(run_dir: Path) -> str | None:
    """The commit of the hub backbone that the run had; None for a local one."""
    commit = read_object(run_dir / "config.json").get("backbone_revision")
    return commit if isinstance(commit, str) else None

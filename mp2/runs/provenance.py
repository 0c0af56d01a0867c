"""What a run depends on: hashes that must be the same to go on with it, versions that are only noted."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mp2.errors import MismatchError
from mp2.messages import say
from mp2.runs.config import SCHEMA_VERSION, BbtConfig

if TYPE_CHECKING:
    from mp2.runs.few_shot_problem import FewShotProblem
    from mp2.runs.frozen_model import FrozenModel

_VERSIONS = ("mp2", "numpy", "torch", "onnxruntime", "cma", "nevergrad", "bayesian-optimization")


def identity(problem: FewShotProblem) -> dict[str, Any]:
    """What must be the same for a run to be resumed: hashes of everything that losses depend on."""
    return {
        "config_sha256": problem.config.sha256(),
        "backbone_sha256": problem.model.backbone.sha256,
        "prompts_sha256": problem.model.prompts.sha256,
        "data_sha256": problem.data_sha256,
        "card_version": problem.card.version,
        **({} if problem.head.kind == "span" else {"head": problem.head.as_dict()}),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results can depend on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_identity(path: Path, recorded: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ``MismatchError`` if a journal's header [recorded] is not of the run as it would be ``now``."""
    for name, value in now.items():
        if recorded.get(name) != value:
            raise MismatchError(
                f"{path} was written with {name} {str(recorded.get(name))[:16]}, got {str(value)[:16]}: "
                "what the run depends on has changed; put it back, or start a new run"
            )
    current = versions()
    changed = {n: v for n, v in recorded.get("versions", {}).items() if current.get(n) != v}
    if changed:
        was = ", ".join(f"{n} {v} (now {current.get(n, 'missing')})" for n, v in changed.items())
        say(f"the run was begun with {was}; the result may differ in the last bits")


def config_file(config: BbtConfig, model: FrozenModel) -> dict[str, Any]:
    """What ``config.json`` holds."""
    return {
        "schema_version": SCHEMA_VERSION,
        "config": config.to_json(),
        "config_sha256": config.sha256(),
        "backbone_revision": model.backbone.revision,  # the commit that a hub's revision was
        "runtime_reason": model.backend.reason,
        "versions": versions(),
    }

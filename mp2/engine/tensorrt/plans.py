"""TensorRT plans beside the graphs they were built from: keyed, verified when loaded, rebuilt when stale.

``plans/<graph>-<digest>.plan`` has a sidecar ``.json`` that says what the plan was built from and for. A plan
is used only if graph and weights, TensorRT release, GPU, precision and build settings are those of now, its
bytes have the recorded hash, and one of its profiles covers the sizes that are asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mp2.engine.bundle import Bundle
from mp2.engine.folder import EngineFolder
from mp2.engine.onnx.model_files import read_model, weight_files
from mp2.engine.tensorrt.builder import BuildSettings, build_plan
from mp2.engine.tensorrt.profiles import Profile, Sizes, TaskShapes, best_profile, grown
from mp2.errors import Mp2Error
from mp2.files import own_folder, write_bytes
from mp2.json_files import build, read_object

PLANS = "plans"
SHAPES = "shapes.json"


@dataclass(frozen=True)
class Gpu:
    """What a plan's kernels were chosen on."""

    name: str
    capability: str  # "9.0"

    @classmethod
    def current(cls, device: str) -> Gpu:
        """Return the CUDA ``device``'s."""
        import torch

        major, minor = torch.cuda.get_device_capability(device)
        return cls(torch.cuda.get_device_name(device), f"{major}.{minor}")


@dataclass(frozen=True)
class Plan:
    """A verified plan and the profiles it was built with."""

    data: bytes
    profiles: tuple[Profile, ...]


class PlanStore:
    """The plans of one bundle for one TensorRT release and GPU; builds what is missing."""

    def __init__(
        self,
        folder: Bundle,
        module: ModuleType,
        gpu: Gpu,
        *,
        settings: BuildSettings | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Keep ``folder``'s plans, tuned for its shapes; ``note`` hears what is built and why."""
        self._folder = folder
        self._module = module
        self._gpu = gpu
        self.shapes = read_shapes(folder)
        self._settings = settings or BuildSettings()
        self._note = note
        self._path = folder.path / PLANS

    def get(self, graph: str, sizes: Sizes | None = None) -> Plan:
        """Return a plan of ``graph`` that covers ``sizes`` (None: whatever it covers), built if need be."""
        origin = self._origin(graph)
        plan, reason = self._load(graph, origin)
        if plan is not None and (sizes is None or best_profile(plan.profiles, sizes) is not None):
            return plan
        if plan is None:
            profiles = self.shapes.whole_profiles()
        else:
            profiles, reason = plan.profiles, f"no profile of its plan covers {dict(sizes or {})}"
        if sizes is not None and best_profile(profiles, sizes) is None:
            profiles = grown(profiles, sizes)
        self._note(f"building a TensorRT plan of {graph}: {reason}")
        with read_model(self._folder, graph).on_disk() as path:  # TensorRT opens the weights itself
            built = build_plan(
                self._module,
                path,
                profiles,
                settings=self._settings,
                timing_cache=self._timing_cache.read_bytes() if self._timing_cache.is_file() else b"",
                note=self._note,
            )
        self._save(graph, origin, profiles, built.plan)
        _write(self._timing_cache, built.timing_cache)
        return Plan(built.plan, profiles)

    @property
    def _timing_cache(self) -> Path:
        release = str(self._module.__version__)
        return self._path / f"timing-sm{self._gpu.capability.replace('.', '')}-{release}.cache"

    def _origin(self, graph: str) -> dict[str, Any]:
        """What a plan of ``graph`` must have been built from and for; profiles apart."""
        files = self._folder.files
        return {
            "graph": files[graph],
            "weights": {name: files[name] for name in sorted(weight_files(self._folder, graph))},
            "tensorrt": str(self._module.__version__),
            "gpu": asdict(self._gpu),
            "precision": self._folder.precision,
            "settings": asdict(self._settings),
        }

    def _load(self, graph: str, origin: dict[str, Any]) -> tuple[Plan | None, str]:
        """Return the plan, or None and why there is none."""
        reason = "there is none yet"
        for sidecar in sorted(self._path.glob(f"{Path(graph).stem}-*.json")):
            try:
                recorded = read_object(sidecar)
                found, digest = recorded["origin"], recorded["sha256"]
                profiles = tuple(
                    Profile({name: (int(a), int(b), int(c)) for name, (a, b, c) in ranges.items()})
                    for ranges in recorded["profiles"]
                )
                differing = [name for name in origin if found.get(name) != origin[name]]
            except (OSError, ValueError, KeyError, TypeError, AttributeError, Mp2Error):
                reason = f"{sidecar.name} is damaged"
                continue
            if differing:
                name = differing[0]
                then, now = _short(found.get(name)), _short(origin[name])
                reason = f"{sidecar.stem} is stale: {name} is {then}, now {now}"
                continue
            file = sidecar.with_suffix(".plan")
            data = file.read_bytes() if file.is_file() else b""
            if hashlib.sha256(data).hexdigest() != digest:
                reason = f"{file.name} is damaged" if data else f"{file.name} is missing"
                continue
            return Plan(data, profiles), ""
        return None, reason

    def _save(self, graph: str, origin: dict[str, Any], profiles: Sequence[Profile], plan: bytes) -> None:
        """Write plan and sidecar; an older plan for the same release, GPU and precision gives way."""
        ranges = [{name: list(r) for name, r in profile.ranges.items()} for profile in profiles]
        key = json.dumps({"origin": origin, "profiles": ranges}, sort_keys=True)
        stem = f"{Path(graph).stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        for sidecar in self._path.glob(f"{Path(graph).stem}-*.json"):
            if sidecar.stem != stem and _same_place(sidecar, origin):
                sidecar.unlink()
                sidecar.with_suffix(".plan").unlink(missing_ok=True)
        _write(self._path / f"{stem}.plan", plan)
        record = {"origin": origin, "profiles": ranges, "sha256": hashlib.sha256(plan).hexdigest()}
        _write(self._path / f"{stem}.json", (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def read_shapes(folder: EngineFolder | Bundle) -> TaskShapes:
    """Return the shapes that ``folder``'s TensorRT engines are tuned for; FormatError if they are damaged."""
    path = folder.file(SHAPES)
    return build(TaskShapes, read_object(path), path)


def _same_place(sidecar: Path, origin: dict[str, Any]) -> bool:
    try:
        found = read_object(sidecar)["origin"]
        return all(found[name] == origin[name] for name in ("tensorrt", "gpu", "precision"))
    except (OSError, Mp2Error, KeyError, TypeError):
        return True  # a plan without a readable description is never loaded: it can go


def _short(value: object) -> str:
    text = ", ".join(str(value[name]) for name in sorted(value)) if isinstance(value, dict) else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _write(path: Path, data: bytes) -> None:
    own_folder(path.parent)
    write_bytes(path, data)

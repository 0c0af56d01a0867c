"""The ONNX Runtime backend: the chain graphs of an engine folder, one session a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mp2.backbone import Backbone, resolve_device
from mp2.engine.backend import is_out_of_memory
from mp2.engine.folder import EngineFolder
from mp2.engine.onnx.library import load_onnxruntime
from mp2.engine.onnx.model_files import read_model
from mp2.engine.onnx.providers import Provider
from mp2.engine.onnx.session import OnnxSession
from mp2.engine.onnx.stages import GraphStages
from mp2.engine.tensorrt.plans import SHAPES, read_shapes
from mp2.engine.tensorrt.profiles import Profile, stretched
from mp2.errors import MismatchError, Mp2Error
from mp2.messages import say

_CACHE = "onnxruntime"  # of the TensorRT provider, inside the engine folder
_CHOSEN_BY_TENSORRT = ("fp16", "bf16")  # precisions that its provider can run a float32 graph in


class OnnxBackend(GraphStages):
    """The stages on one of ONNX Runtime's providers; a stage's session is opened when it is first used.

    Activations stay on the provider's device from one graph of the chain to the next.
    """

    name: str = "onnxruntime"

    def __init__(
        self,
        backbone: Backbone,
        engine_dir: Path,
        *,
        device: str = "cpu",
        provider: str | None = None,
        threads: int | None = None,
        precision: str = "fp32",
        reason: str = "",
        note: Callable[[str], None] = say,
    ) -> None:
        """Verify ``engine_dir`` against ``backbone``; FormatError or MismatchError if it does not fit.

        ``provider`` is one of `PROVIDERS` or `PLUGINS` (None: what ``device`` says), and
        MissingDependencyError says what to install for it. The TensorRT provider keeps engines in the folder;
        where a folder brings profiles that are too small, ``note`` hears of the build of a larger one.
        """
        super().__init__(backbone, device=device, precision=precision, reason=reason or "asked for")
        kind = provider or resolve_device(device).type
        self._folder = EngineFolder.open(engine_dir, backbone)
        manifest = self._folder.manifest
        chosen = kind == "tensorrt" and manifest.precision == "fp32" and precision in _CHOSEN_BY_TENSORRT
        if manifest.precision != precision and not chosen:
            raise MismatchError(
                f"engine folder {engine_dir} holds {manifest.precision}, expected {precision}; "
                f"pass --precision {manifest.precision}"
            )
        self._provider = Provider(
            kind=kind,
            device=device,
            cache=self._folder.path / _CACHE if kind == "tensorrt" else None,
            precision=precision if chosen else "fp32",
            shapes=read_shapes(self._folder) if SHAPES in manifest.files else None,
        )
        self._provider.check()
        resolve_device(device)
        self._threads = threads
        self._note = note
        self._sessions: dict[str, OnnxSession] = {}
        if kind not in ("cpu", "cuda"):
            self.name = f"onnxruntime-{kind}"  # by which the same one is made again
        if kind != "cpu":
            self._session("embed.onnx", {})  # what is missing for the provider is said now

    def _run(
        self, graph: str, feeds: Mapping[str, torch.Tensor], shape: Sequence[int], output: str = "hidden_out"
    ) -> torch.Tensor:
        session = self._session(graph, feeds)
        try:
            return session.run(feeds, {output: shape})[0]
        except Exception as error:  # onnxruntime's have no common base; a graph of other names is a KeyError
            if isinstance(error, Mp2Error) or is_out_of_memory(error):
                raise
            raise Mp2Error(
                f"{self._folder.path / graph}: fails in onnxruntime: {_first_line(error)}; "
                "export the engine again"
            ) from error

    def _session(self, graph: str, feeds: Mapping[str, torch.Tensor]) -> OnnxSession:
        """Return the session of ``graph``, opened again where its profile is too small for ``feeds``."""
        session = self._sessions.get(graph)
        if session is None:
            session = self._sessions[graph] = self._open(graph, None)
        if session.profile is None or not feeds or (sizes := session.sizes_beyond(feeds)) is None:
            return session
        profile = stretched(session.profile, sizes)
        most = ", ".join(f"{name} {profile.ranges[name][2]}" for name in sizes)
        self._note(
            f"building a larger TensorRT engine of {graph} (up to {most}): its profile does not cover {sizes}"
        )
        del session, self._sessions[graph]  # its memory is given back before more is asked for
        self._sessions[graph] = self._open(graph, profile)
        return self._sessions[graph]

    def _open(self, graph: str, profile: Profile | None) -> OnnxSession:
        try:
            return OnnxSession(
                read_model(self._folder, graph),
                threads=self._threads,
                provider=self._provider,
                profile=profile,
            )
        except Exception as error:  # onnxruntime's have no common base
            if isinstance(error, Mp2Error) or is_out_of_memory(error):
                raise
            raise Mp2Error(
                f"onnxruntime {load_onnxruntime().__version__} cannot load {graph} for runtime '{self.name}' "
                f"on device {self.device}: {_first_line(error)}; use --runtime torch, or install "
                "another onnxruntime"
            ) from error


def _first_line(error: Exception) -> str:
    said = str(error) or type(error).__name__
    return f"{type(error).__name__}: {said}".splitlines()[0][:200]

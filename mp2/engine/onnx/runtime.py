"""The ONNX Runtime runtime: the chain graphs of an engine folder, one session a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime as ort
import torch

from mp2.backbone import Backbone, resolve_device
from mp2.engine.batches import even_parts
from mp2.engine.folder import EngineFolder, layer_file
from mp2.engine.onnx.providers import Provider
from mp2.engine.onnx.session import OnnxSession
from mp2.engine.runtime import Prefix, check_positions, is_out_of_memory, say
from mp2.engine.tensorrt.plans import SHAPES, read_shapes
from mp2.engine.tensorrt.profiles import Profile, stretched
from mp2.errors import MismatchError, Mp2Error
from mp2.export.onnx_cpu_graphs import cpu_layer_model
from mp2.export.onnx_cpu_probe import cpu_graphs_problem
from mp2.export.tensorrt.graphs import plain_layer_file

_CACHE = "onnxruntime"  # of the TensorRT provider, inside the engine folder
_BLOCK_ROWS = 512  # of a layer at once: its products want them in a core's own cache
_NARROW_FFN = 1024  # up to here twice as many
_CHOSEN_BY_TENSORRT = ("fp16", "bf16")  # precisions that its provider can run a float32 graph in


class OnnxRuntime:
    """`Runtime` on one of ONNX Runtime's providers; a stage's session is opened when it is first used.

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
        fused: bool = True,
        note: Callable[[str], None] = say,
    ) -> None:
        """Verify ``engine_dir`` against ``backbone``; FormatError or MismatchError if it does not fit.

        ``provider`` is ``cpu``, ``cuda`` or ``tensorrt`` (None: what ``device`` says), and
        MissingDependencyError says what to install for it. The TensorRT provider keeps engines in the folder;
        where a folder brings profiles that are too small, ``note`` hears of the build of a larger one.
        On the CPU in fp32, layers run in `mp2.export.onnx_cpu_graphs`' form where the installed onnxruntime
        can (``.reason`` says if not), without ``fused`` as the folder has them.
        """
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
        self.device = device
        self.precision = precision
        self.reason = reason or "asked for"
        self._fused = fused and kind == "cpu" and manifest.precision == "fp32"
        if self._fused and (problem := cpu_graphs_problem()):
            self._fused = False
            self.reason += f"; standard operators only: {problem}"
        self._threads = threads
        self._config = backbone.config
        self._note = note
        self._sessions: dict[str, OnnxSession] = {}
        if kind == "tensorrt":
            self.name = "onnxruntime-tensorrt"  # by which the same one is made again
        if kind != "cpu":
            self._session("embed.onnx", {})  # what is missing for the provider is said now

    def embed(self, input_ids: torch.Tensor, n_inline: int = 0) -> torch.Tensor:
        """See `Runtime.embed`."""
        n, t = input_ids.shape
        check_positions(t, n_inline, self._config.max_positions)
        feeds = {"input_ids": input_ids, "n_inline": torch.tensor(n_inline)}
        return self._run("embed.onnx", feeds, (1, n, t, self._config.hidden))

    def embed_inline(self, prompts: torch.Tensor) -> torch.Tensor:
        """See `Runtime.embed_inline`."""
        p, m, width = prompts.shape
        return self._run("embed_inline.onnx", {"prompts": prompts}, (p, 1, m, width))

    def layer(
        self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: Prefix | None
    ) -> torch.Tensor:
        """See `Runtime.layer`."""
        p, n, t, width = hidden.shape
        if mask is None:
            mask = torch.ones(n, t, dtype=torch.bool, device=hidden.device)
        if prefix is None and plain_layer_file(index) in self._folder.manifest.files:
            feeds = {"hidden": hidden, "mask": mask}
            return self._run(plain_layer_file(index), feeds, (p, n, t, width))
        if prefix is None:
            empty = hidden.new_empty(1, 1, self._config.n_heads, 0, self._config.head_size)
            prefix = (empty, empty)
        whole = {"hidden": hidden, "mask": mask, "prefix_keys": prefix[0], "prefix_values": prefix[1]}
        session = self._session(layer_file(index, "onnx"), whole)
        out = session.empty("hidden_out", (max(p, prefix[0].shape[0]), n, t, width))
        for candidates, examples in self._blocks(*out.shape[:3]):
            feeds = {
                "hidden": _part(hidden, candidates, examples),
                "mask": mask[examples],
                "prefix_keys": _part(prefix[0], candidates, examples),
                "prefix_values": _part(prefix[1], candidates, examples),
            }
            session.run(feeds, {"hidden_out": out[candidates, examples]})
        return out

    def head(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """See `Runtime.head`."""
        feeds = {"hidden": hidden, "span_weight": weight, "span_bias": bias}
        return self._run("head.onnx", feeds, (*hidden.shape[:-1], 2), "logits")

    def _run(
        self, graph: str, feeds: dict[str, torch.Tensor], shape: tuple[int, ...], output: str = "hidden_out"
    ) -> torch.Tensor:
        return self._session(graph, feeds).run(feeds, {output: shape})[0]

    def _blocks(self, p: int, n: int, t: int) -> list[tuple[slice, slice]]:
        """(candidates, examples) whose rows lie together, in the order of the rows."""
        if not self._fused:
            return [(slice(p), slice(n))]
        rows = _BLOCK_ROWS * (2 if self._config.ffn <= _NARROW_FFN else 1)
        if p == 1:
            return [(slice(1), part) for part in even_parts(n, max(1, rows // t))]
        return [(part, slice(n)) for part in even_parts(p, max(1, rows // (n * t)))]

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
        model: Path | bytes = self._folder.file(graph)
        layers = [layer_file(i, "onnx") for i in range(self._config.n_layers)]
        if self._fused and graph in layers:
            fused = cpu_layer_model(self._folder.file(graph), self._config, layers.index(graph))
            model = fused.SerializeToString()
        try:
            return OnnxSession(
                model,
                threads=self._threads,
                provider=self._provider,
                weights=self._folder.path,
                profile=profile,
            )
        except Exception as error:  # onnxruntime's have no common base
            if isinstance(error, Mp2Error) or is_out_of_memory(error):
                raise
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise Mp2Error(
                f"onnxruntime {ort.__version__} cannot load {graph} for runtime '{self.name}' on device "
                f"{self.device}: {why}; use --runtime torch, or install another onnxruntime"
            ) from error


def _part(x: torch.Tensor, candidates: slice, examples: slice) -> torch.Tensor:
    """Return some candidates and examples of ``x`` [P or 1, N or 1, ...]."""
    x = x if x.shape[0] == 1 else x[candidates]
    return x if x.shape[1] == 1 else x[:, examples]

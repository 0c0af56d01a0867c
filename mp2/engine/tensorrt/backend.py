"""The TensorRT backend: the chain graphs of an engine folder as plans, activations resident on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mp2.backbone import Backbone, resolve_device
from mp2.engine.folder import EngineFolder, layer_file, plain_layer_file
from mp2.engine.onnx.stages import HIDDEN_TYPES, GraphStages
from mp2.engine.tensorrt.builder import BuildSettings, input_shapes
from mp2.engine.tensorrt.calls import CudaDevice, Device, EngineCalls, Scratch
from mp2.engine.tensorrt.library import load_tensorrt
from mp2.engine.tensorrt.plans import Gpu, PlanStore
from mp2.engine.tensorrt.profiles import sizes_of
from mp2.errors import MismatchError
from mp2.messages import say

_TYPES = dict.fromkeys(
    ("prompts", "prefix_keys", "prefix_values", "span_weight", "span_bias", "logits"), torch.float32
)


class TensorRTBackend(GraphStages):
    """The stages on TensorRT; a graph's plan is loaded on first use, and built if missing or stale."""

    name = "tensorrt"
    deep_inline = False

    def __init__(
        self,
        backbone: Backbone,
        engine_dir: Path,
        *,
        device: str = "cuda",
        precision: str = "fp16",
        settings: BuildSettings | None = None,
        cuda_graphs: bool = True,
        reason: str = "",
        note: Callable[[str], None] = say,
    ) -> None:
        """Verify ``engine_dir`` (``mp2 export --runtime tensorrt``) against ``backbone`` and ``precision``.

        Plans are tuned for the folder's shapes; other batches work, after a build that ``note`` hears of.
        Raises MissingDependencyError (TensorRT, CUDA), FormatError or MismatchError (a folder that is
        damaged, another backbone's or of another precision).
        """
        module = load_tensorrt()
        resolve_device(device)
        folder = EngineFolder.open(engine_dir, backbone)
        manifest = folder.manifest
        if manifest.runtime != self.name:
            raise MismatchError(
                f"engine folder {engine_dir} is for runtime '{manifest.runtime}', expected 'tensorrt'; "
                f"run 'mp2 export --backbone {backbone.config.name} --runtime tensorrt --out DIR'"
            )
        if manifest.precision != precision:
            raise MismatchError(
                f"engine folder {engine_dir} holds {manifest.precision}, expected {precision}; "
                f"pass --precision {manifest.precision}"
            )
        super().__init__(backbone, device=device, precision=precision, reason=reason or "asked for")
        self._types = _TYPES | dict.fromkeys(("hidden", "hidden_out"), HIDDEN_TYPES[precision])
        self._module = module
        self._folder = folder
        self._on: Device = CudaDevice(device)
        self._plans = PlanStore(folder, module, Gpu.current(device), settings=settings, note=note)
        self._scratch = Scratch(self._on)
        self._cuda_graphs = cuda_graphs
        self._calls: dict[str, EngineCalls] = {}

    def prepare(self) -> None:
        """Load or build every plan that a run on the folder's shapes uses."""
        last = self._config.n_layers - 1
        deep = [layer_file(i, "onnx") for i in range(last + 1)]
        shallow = ["embed_inline.onnx", *map(plain_layer_file, range(last)), layer_file(last, "onnx")]
        with self._on.current():
            for graph in ("embed.onnx", *(shallow if self._plans.shapes.shallow else deep), "head.onnx"):
                if graph not in self._calls:
                    self._calls[graph] = self._load(graph, None)

    def has_plan(self, graph: str) -> bool:
        """Tell whether ``graph`` has a plan that can be loaded, so that running it builds none."""
        return graph in self._calls or self._plans.has(graph)

    def _run(
        self,
        graph: str,
        feeds: Mapping[str, torch.Tensor],
        shape: Sequence[int],
        output: str = "hidden_out",
    ) -> torch.Tensor:
        feeds = {name: x.to(self.device, self._types.get(name)).contiguous() for name, x in feeds.items()}
        with self._on.current():
            calls = self._calls.get(graph)
            if calls is None or not calls.covers(feeds):
                calls = self._calls[graph] = self._load(graph, feeds)
            result = self._on.empty(shape, self._types[output])
            calls(feeds, {output: result})
        return result

    def _load(self, graph: str, feeds: Mapping[str, torch.Tensor] | None) -> EngineCalls:
        """Return the graph's engine, with a profile for ``feeds`` (None: whatever the plan covers)."""
        shapes = input_shapes(self._folder.file(graph))
        if self._calls.pop(graph, None) is not None:
            self._scratch.graphs.clear()  # some belong to the engine that goes
        given = None if feeds is None else {name: tuple(x.shape) for name, x in feeds.items()}
        return EngineCalls(
            self._module,
            self._plans.get(graph, None if given is None else sizes_of(shapes, given)),
            graph,
            shapes,
            self._on,
            self._scratch,
            cuda_graphs=self._cuda_graphs,
        )

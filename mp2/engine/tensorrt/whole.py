"""A bundle's graph of the whole backbone as a TensorRT plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mp2.backbone import resolve_device
from mp2.engine.bundle import Bundle
from mp2.engine.tensorrt.builder import BuildSettings, input_shapes
from mp2.engine.tensorrt.calls import CudaDevice, Device, EngineCalls
from mp2.engine.tensorrt.library import load_tensorrt
from mp2.engine.tensorrt.plans import Gpu, PlanStore
from mp2.engine.tensorrt.profiles import sizes_of
from mp2.messages import say

_INTEGERS = ("input_ids", "attention_mask", "prompt_length", "segments")


class PlannedGraph:
    """One graph of a bundle on TensorRT; its plan is built where it is missing, stale or too small."""

    def __init__(
        self,
        bundle: str | Path,
        graph: str,
        *,
        device: str = "cuda",
        settings: BuildSettings | None = None,
        note: Callable[[str], None] = say,
    ) -> None:
        """Verify ``bundle`` and take its ``graph``; ``note`` hears of every build.

        Raises MissingDependencyError (TensorRT, CUDA), FormatError (a bundle that is damaged).
        """
        module = load_tensorrt()
        resolve_device(device)
        self._bundle = Bundle.open(bundle)
        self._graph, self._device, self._module = graph, device, module
        self._shapes = input_shapes(self._bundle.read(graph))
        self._outputs: Mapping[str, list[int | str]] = {
            name: x["shape"] for name, x in self._bundle.manifest["graphs"][graph]["outputs"].items()
        }
        self._on: Device = CudaDevice(device)
        self._plans = PlanStore(self._bundle, module, Gpu.current(device), settings=settings, note=note)
        self._calls: EngineCalls | None = None

    def prepare(self) -> bytes:
        """Load or build the plan for the bundle's shapes, and return it."""
        with self._on.current():
            self._calls = self._load(None)
            return self._plans.get(self._graph).data

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return every output for ``feeds``; docs/engines.md has names, shapes and meanings.

        Where no prompt has a row, one of zeros is fed (``prompt_length`` 0): TensorRT takes no empty tensor.
        """
        given = {}
        for name in self._shapes:
            x = feeds[name]
            if name.startswith("prompt_") and name != "prompt_length" and x.shape[-2] == 0:
                x = x.new_zeros(*x.shape[:-2], 1, x.shape[-1])
            dtype = torch.int64 if name in _INTEGERS else torch.float32
            given[name] = x.to(self._device, dtype).contiguous()
        sizes = sizes_of(self._shapes, {name: tuple(x.shape) for name, x in given.items()})
        with self._on.current():
            if self._calls is None or not self._calls.covers(sizes):
                self._calls = self._load(sizes)
            results = {
                name: self._on.empty([sizes[x] if isinstance(x, str) else x for x in shape], torch.float32)
                for name, shape in self._outputs.items()
            }
            self._calls(given, results)
        return results

    def _load(self, sizes: Mapping[str, int] | None) -> EngineCalls:
        self._calls = None  # its memory is given back before more is asked for
        plan = self._plans.get(self._graph, sizes)
        return EngineCalls(self._module, plan, self._graph, self._shapes, self._on)

"""``mp2 export --runtime tensorrt``: typed graphs, a report of what the precision costs, and plans."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mp2.backbone import Backbone
from mp2.engine.folder import MANIFEST, EngineFolder
from mp2.engine.tensorrt.plans import SHAPES
from mp2.engine.tensorrt.profiles import TaskShapes
from mp2.errors import Mp2Error, UnknownNameError
from mp2.export.export import (
    check_target,
    folder_manifest,
    put_in_place,
    save_graph,
    store_embeddings,
    write_graphs,
)
from mp2.export.parity import Comparison, failed
from mp2.export.tensorrt.calibration import calibration_inputs, input_maxima
from mp2.export.tensorrt.graphs import (
    PRECISIONS,
    TypedGraphBuilder,
    plain_layer_file,
    plain_layer_model,
)
from mp2.export.tensorrt.parity import compare_runtime
from mp2.export.tensorrt.weights import store_layer
from mp2.export.weights import WeightStore

if TYPE_CHECKING:
    from mp2.engine.agreement import Agreement
    from mp2.engine.runtime import Runtime
    from mp2.prompts import PromptSet
    from mp2.tasks import MrcInput

_AGREEMENT_EXAMPLES = 16


def export_typed(
    backbone: Backbone,
    out: str | Path,
    *,
    precision: str = "fp16",
    prompts: PromptSet | None = None,
    shapes: TaskShapes | None = None,
    report: Callable[[Comparison], None] = lambda comparison: None,
) -> EngineFolder:
    """Write ``backbone``'s typed graphs to ``out``; needs neither a GPU nor TensorRT.

    Every stage is compared with torch by emulation on the CPU, and ``report`` sees each comparison. ``fp8``
    is calibrated on the embedded tasks under ``prompts`` (whose head the deployment graphs get, too). Plans
    made from the folder are tuned for ``shapes``.

    Raises UnknownNameError (precision), UsageError (``out`` holds something else), Mp2Error (an output out of
    tolerance; nothing is left at ``out``).
    """
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    out = check_target(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(backbone, partial, precision, prompts)
        shapes_text = json.dumps(asdict(shapes or TaskShapes()), indent=2) + "\n"
        (partial / SHAPES).write_text(shapes_text, encoding="utf-8")
        _check(emulated_runtime(backbone, partial, precision), backbone, report, out)
        manifest = folder_manifest(backbone, partial, prompts, "tensorrt", precision)
        (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        put_in_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return EngineFolder(out, manifest)


def build_plans(
    backbone: Backbone,
    folder: EngineFolder,
    *,
    device: str = "cuda",
    report: Callable[[Comparison], None] = lambda comparison: None,
) -> Runtime:
    """Build every plan of a typed ``folder`` on this GPU and compare what they compute with torch.

    Raises MissingDependencyError (TensorRT, CUDA), Mp2Error (TensorRT's refusal, an output out of tolerance).
    """
    from mp2.engine.tensorrt.runtime import TensorRTRuntime

    runtime = TensorRTRuntime(backbone, folder.path, device=device, precision=folder.manifest.precision)
    runtime.prepare()
    _check(runtime, backbone, report, None)
    return runtime


def precision_cost(
    runtime: Runtime, backbone: Backbone, prompts: PromptSet | None, inputs: Sequence[MrcInput]
) -> Agreement:
    """Return how a population's losses in the middle of ``backbone`` agree with float32's.

    On the first 16 ``inputs``. Without deep ``prompts``, random ones stand in.
    """
    from mp2.engine.agreement import agreement
    from mp2.prompts import random_prompts

    if prompts is None or prompts.kind != "deep":
        prompts = random_prompts(backbone, "deep", prompt_tokens=10, intrinsic_dim=20, scale=5.0)
    chosen = inputs[:_AGREEMENT_EXAMPLES]
    return agreement(runtime, backbone, prompts, chosen, backbone.config.n_layers // 2)


def emulated_runtime(backbone: Backbone, folder: Path, precision: str) -> Runtime:
    """Return the CPU's emulation of the graphs in ``folder``."""
    from mp2.engine.tensorrt.emulated_runtime import EmulatedRuntime

    return EmulatedRuntime(backbone, folder, precision)


def _write(backbone: Backbone, folder: Path, precision: str, prompts: PromptSet | None) -> None:
    config, store = backbone.config, WeightStore(folder)
    maxima = None
    if precision == "fp8":
        maxima = input_maxima(backbone, calibration_inputs(backbone), prompts)
    store_embeddings(backbone, store)
    for i in range(config.n_layers):
        store_layer(backbone, store, i, precision, maxima)
    if prompts is not None:
        store.add("span_head.bin", "span_weight", prompts.span_weight.detach().numpy())
        store.add("span_head.bin", "span_bias", prompts.span_bias.detach().numpy())

    def new() -> TypedGraphBuilder:
        return TypedGraphBuilder(config, store, precision)

    write_graphs(new, folder, baked_head=prompts is not None)
    for i in range(config.n_layers):
        save_graph(plain_layer_model(new(), i), folder / plain_layer_file(i))


def _check(
    runtime: Runtime, backbone: Backbone, report: Callable[[Comparison], None], out: Path | None
) -> None:
    comparisons = []
    for comparison in compare_runtime(runtime, backbone):
        comparisons.append(comparison)
        report(comparison)
    if bad := failed(comparisons):
        raise Mp2Error(
            f"{len(bad)} of {len(comparisons)} outputs of runtime '{runtime.name}' in {runtime.precision} "
            f"differ from torch, first '{bad[0].name}': {bad[0].max_rel:.1e} relative, expected at most "
            f"{bad[0].tolerance:.0e}" + ("" if out is None else f"; nothing was written to {out}")
        )

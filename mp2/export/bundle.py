"""``mp2 export --run``: a bundle that answers several tasks on one backbone, without mp2.

A bundle is one graph of the backbone (two where shallow prompts are among the runs), the tokenizer and, for
each task, its card and its prompt as tensors. ``run.py`` in it needs onnxruntime, tokenizers and numpy. What
everything is called and means stands in docs/engines.md and in the README.md of the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

import onnx
import torch
from safetensors.torch import save

from mp2.backbone import Backbone
from mp2.engine.bundle import BUNDLE_FORMAT, BUNDLE_SCHEMA_VERSION, Bundle
from mp2.engine.folder import MANIFEST, file_sha256
from mp2.engine.tensorrt.plans import SHAPES
from mp2.engine.tensorrt.profiles import TaskShapes
from mp2.errors import Mp2Error, UnknownNameError
from mp2.export.bundle_tasks import TunedTask, named_tasks, read_run, run_backbone, task_card
from mp2.export.engine_folder import backbone_entry, check_target, replaced, save_graph, versions
from mp2.export.graph_builder import OPSET, GraphBuilder
from mp2.export.graphs import (
    INLINE_GRAPH,
    PREFIX_GRAPH,
    backbone_inline_model,
    backbone_model,
)
from mp2.export.parity import Comparison, check, compare_whole, emulated_graph
from mp2.export.stored_arrays import store_backbone, store_mlm
from mp2.files import write_bytes, write_json

BUNDLE_PRECISIONS = ("fp32", "fp16", "bf16")
_ROWS = 32  # of a batch, and tokens up to which it is padded: what TensorRT plans are made for
_LENGTHS = (64, 128, 256)
_FILES = Path(__file__).with_name("bundle_files")
_PROGRAMS = ("run.py", "reading.py")
HEADS = {  # what of a graph they use
    "span": {"inputs": ["span_weight", "span_bias"], "outputs": ["start_logits", "end_logits"]},
    "mlm": {"inputs": ["segments"], "outputs": ["word_log_probs"]},
    "ridge": {"inputs": ["segments"], "outputs": ["pooled"]},
}
_WRITERS = {PREFIX_GRAPH: backbone_model, INLINE_GRAPH: backbone_inline_model}


def write_bundle(
    runs: Sequence[Path],
    out: str | Path,
    *,
    backbone: str | None = None,
    revision: str | None = None,
    prompts: str | None = None,
    precision: str = "fp32",
    report: Callable[[Comparison], None] = lambda comparison: None,
) -> dict[str, Any]:
    """Write the bundle of finished ``runs`` to ``out`` and return its manifest.

    ``backbone`` and ``prompts`` say where these are now (None: where each run found them). The graphs are
    compared with torch, below float32 by emulation; ``report`` sees each comparison. ``out`` must be new,
    empty or an older folder of `mp2 export`, and is complete or not there.

    Raises UsageError (no run, one that has not ended, deep inline prompts), MismatchError (runs on several
    backbones), Mp2Error (an output out of tolerance; nothing is left at ``out``).
    """
    if precision not in BUNDLE_PRECISIONS:
        raise UnknownNameError("precision", precision, BUNDLE_PRECISIONS)
    check_target(out)
    loaded = run_backbone(runs[0], backbone, revision)
    tasks = named_tasks([read_run(run, loaded, prompts) for run in runs])
    with replaced(out) as (out, folder):
        graphs = sorted({task.graph for task in tasks.values()})
        store = store_backbone(loaded, folder, precision, None)
        mlm = loaded.mlm_head if any(task.kind == "mlm" for task in tasks.values()) else None
        if mlm is not None:
            store_mlm(mlm, store)
        for graph in graphs:
            save_graph(_WRITERS[graph](GraphBuilder(loaded.config, store, precision), mlm), folder / graph)
            try:
                compared = compare_whole(emulated_graph(folder / graph), loaded, precision, graph, mlm)
                check(compared, report, f"{graph} in {precision}")
            except Mp2Error as error:
                raise Mp2Error(f"{error}; nothing was written to {out}") from error
        (folder / "tokenizer.json").write_text(loaded.tokenizer.to_json(), encoding="utf-8")
        (folder / "tasks").mkdir()
        for name, task in tasks.items():
            write_bytes(folder / _tensors_file(name), save({**task.tensors, **task.head_tensors}))
            write_json(folder / _card_file(name), task_card(name, task, loaded))
        for name in _PROGRAMS:
            (folder / name).write_bytes((_FILES / name).read_bytes())
        shapes = json.dumps(asdict(_shapes(loaded, tasks.values())), indent=2) + "\n"
        (folder / SHAPES).write_text(shapes, encoding="utf-8")
        manifest = _manifest(loaded, folder, tasks, graphs, precision)
        (folder / "README.md").write_text(_readme(manifest), encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest["files"] = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        write_json(folder / MANIFEST, manifest)
    return manifest


def build_bundle_plans(
    bundle: Bundle,
    backbone: Backbone,
    *,
    device: str = "cuda",
    report: Callable[[Comparison], None] = lambda comparison: None,
) -> dict[str, bytes]:
    """Build a TensorRT plan of each graph on this GPU, compare it with torch, and return graph -> plan.

    Raises MissingDependencyError (TensorRT, CUDA), Mp2Error (TensorRT's refusal, an output out of tolerance).
    """
    from mp2.engine.tensorrt.whole import PlannedGraph

    plans = {}
    for graph in bundle.manifest["graphs"]:
        planned = PlannedGraph(bundle.path, graph, device=device)
        plans[graph] = planned.prepare()

        def run(feeds: Any, outputs: Any, planned: PlannedGraph = planned) -> list[torch.Tensor]:
            found = planned.run(feeds)
            return [found[name] for name in outputs]

        mlm = backbone.mlm_head if "word_log_probs" in bundle.manifest["graphs"][graph]["outputs"] else None
        compared = compare_whole(run, backbone, bundle.precision, graph, mlm)
        check(compared, report, f"the TensorRT plan of {graph} in {bundle.precision}")
    return plans


def _tensors_file(name: str) -> str:
    return f"tasks/{name}.safetensors"


def _card_file(name: str) -> str:
    return f"tasks/{name}.json"


def _manifest(
    backbone: Backbone, folder: Path, tasks: dict[str, TunedTask], graphs: Sequence[str], precision: str
) -> dict[str, Any]:
    entries = {
        name: {
            "card": _card_file(name),
            "tensors": _tensors_file(name),
            "graph": task.graph,
            "head": task.kind,
            "prompt_length": task.prompt_length,
        }
        for name, task in tasks.items()
    }
    return {
        "format": BUNDLE_FORMAT,
        "schema_version": BUNDLE_SCHEMA_VERSION,
        "backbone": asdict(backbone_entry(backbone)),
        "precision": precision,
        "opset": OPSET,
        "graphs": {graph: graph_interface(folder / graph) for graph in graphs},
        "heads": {kind: HEADS[kind] for kind in sorted({task.kind for task in tasks.values()})},
        "limits": {
            "positions": backbone.config.max_positions,  # tokens, with the rows of inline prompts
            "pad_id": backbone.tokenizer.pad_id,
        },
        "tasks": entries,
        "versions": versions(),
    }


def graph_interface(graph: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the graph's inputs and outputs: name -> element type and shape, a name where it may vary."""
    model = onnx.load(graph, load_external_data=False).graph

    def described(infos: Sequence[onnx.ValueInfoProto]) -> dict[str, dict[str, Any]]:
        found = {}
        for info in infos:
            kind = info.type.tensor_type
            shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
            element = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
            found[info.name] = {"dtype": {"float": "float32"}.get(element, element), "shape": shape}
        return found

    return {"inputs": described(model.input), "outputs": described(model.output)}


def _shapes(backbone: Backbone, tasks: Collection[TunedTask]) -> TaskShapes:
    """Return the batches that plans of a bundle are made for."""
    longest = max(min(task.meta.max_tokens, backbone.config.max_positions) for task in tasks)
    lengths = sorted({min(length, longest) for length in (*_LENGTHS, longest)})
    return TaskShapes(
        candidates=1,
        examples=_ROWS,
        lengths=tuple(lengths),
        prompt_tokens=max(task.prompt_length for task in tasks),
    )


def _readme(manifest: dict[str, Any]) -> str:
    tables = []
    for graph, sides in manifest["graphs"].items():
        rows = [
            f"| {side[:-1]} | `{name}` | {tensor['dtype']} | {', '.join(map(str, tensor['shape']))} |"
            for side, tensors in sides.items()
            for name, tensor in tensors.items()
        ]
        tables.append(
            "\n".join([f"`{graph}`", "", "| | name | dtype | shape |", "| --- | --- | --- | --- |", *rows])
        )
    tasks = [
        f"| `{name}` | {entry['graph']} | {entry['prompt_length']} | {entry['head']} |"
        for name, entry in manifest["tasks"].items()
    ]
    backbone, first = manifest["backbone"], next(iter(manifest["tasks"]))
    return Template((_FILES / "README.md").read_text("utf-8")).substitute(
        backbone=backbone["name"],
        sha256=backbone["sha256"][:12],
        precision=manifest["precision"],
        n_layers=backbone["n_layers"],
        hidden=backbone["hidden"],
        n_heads=backbone["n_heads"],
        head_size=backbone["hidden"] // backbone["n_heads"],
        positions=manifest["limits"]["positions"],
        tables="\n\n".join(tables),
        tasks="\n".join(tasks),
        first=first,
        version=manifest["versions"]["mp2"],
    )

"""Write an engine folder, compare it with torch, then give it its name."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from mp2 import __version__
from mp2.backbone import Backbone
from mp2.engine.folder import (
    FOLDER_PRECISIONS,
    MANIFEST,
    SCHEMA_VERSION,
    BackboneEntry,
    EngineFolder,
    Manifest,
    file_sha256,
    layer_file,
    looks_exported,
    plain_layer_file,
)
from mp2.engine.onnx.library import load_onnxruntime
from mp2.engine.onnx.session import OnnxSession
from mp2.engine.tensorrt.plans import SHAPES
from mp2.engine.tensorrt.profiles import TaskShapes
from mp2.errors import Mp2Error, UnknownNameError, UsageError
from mp2.export import graphs
from mp2.export.emulated import EmulatedBackend
from mp2.export.graph_builder import OPSET, GraphBuilder
from mp2.export.input_maxima import calibration_inputs, input_maxima
from mp2.export.parity import Comparison, check, compare_stages, compare_whole
from mp2.export.stored_arrays import WeightStore, store_backbone
from mp2.limits import check_new_folder, check_utf8

if TYPE_CHECKING:
    from mp2.engine.agreement import Agreement
    from mp2.engine.chain import ChainBackend
    from mp2.prompts import PromptSet
    from mp2.tasks import MrcInput

_AGREEMENT_EXAMPLES = 16


def export_engine(
    backbone: Backbone,
    out: str | Path,
    *,
    precision: str = "fp32",
    prompts: PromptSet | None = None,
    shapes: TaskShapes | None = None,
    report: Callable[[Comparison], None] = lambda comparison: None,
) -> EngineFolder:
    """Write ``backbone``'s chain graphs to ``out``, which must be new, empty or an older engine folder.

    Needs neither a GPU nor TensorRT. Every stage is compared with torch on the CPU (below float32 by
    emulation), and ``report`` sees each comparison as it is made. ``fp8`` is calibrated on the embedded tasks
    under ``prompts``. TensorRT engines of a folder below float32 are tuned for ``shapes``. The folder is
    built under another name and renamed at the end: a killed export leaves nothing that looks whole.

    Raises UnknownNameError (precision), UsageError (``out`` holds something else), Mp2Error (an output out of
    tolerance; nothing is left at ``out``).
    """
    if precision not in FOLDER_PRECISIONS:
        raise UnknownNameError("precision", precision, FOLDER_PRECISIONS)
    with replaced(out) as (out, partial):
        maxima = None
        if precision == "fp8":
            maxima = input_maxima(backbone, calibration_inputs(backbone), prompts)
        store = store_backbone(backbone, partial, precision, maxima)
        _write_graphs(backbone, store, partial, precision)
        whole = _write_whole_graphs(backbone, store, partial) if precision == "fp32" else []
        if precision != "fp32":
            text = json.dumps(asdict(shapes or TaskShapes()), indent=2) + "\n"
            (partial / SHAPES).write_text(text, encoding="utf-8")
        backend = EmulatedBackend(backbone, partial, precision)
        try:
            check(compare_stages(backend, backbone), report, f"runtime 'emulated' in {precision}")
            for graph in whole:
                compared = compare_whole(OnnxSession(partial / graph).run, backbone, precision, graph)
                check(compared, report, f"{graph} in {precision}")
        except Mp2Error as error:
            raise Mp2Error(f"{error}; nothing was written to {out}") from error
        manifest = _manifest(backbone, partial, precision)
        (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return EngineFolder(out, manifest)


def precision_cost(
    backend: ChainBackend, backbone: Backbone, prompts: PromptSet | None, inputs: Sequence[MrcInput]
) -> Agreement:
    """Return how a population's losses in the middle of ``backbone`` agree with float32's.

    On the first 16 ``inputs``. Without deep ``prompts``, random ones stand in.
    """
    from mp2.engine.agreement import agreement
    from mp2.prompts import random_prompts

    if prompts is None or prompts.kind != "deep":
        prompts = random_prompts(backbone, "deep", prompt_tokens=10, intrinsic_dim=20, scale=5.0)
    chosen = inputs[:_AGREEMENT_EXAMPLES]
    return agreement(backend, prompts, chosen, backbone.config.n_layers // 2)


def check_target(out: str | Path) -> Path:
    """Return ``out`` resolved; UsageError unless it is new, empty or an older folder of `mp2 export`.

    What is there gives way to the new folder as a whole, so it may not be where somebody works, nor above it.
    """
    check_new_folder(Path(out))
    path = Path(out).resolve()
    check_utf8(path, "--out", "the package onnx")
    if path == Path.cwd() or path in Path.cwd().parents:
        raise UsageError(
            f"--out {out} is the working directory or a folder above it, which cannot be replaced; "
            "name a new folder"
        )
    if path.exists() and any(path.iterdir()) and not looks_exported(path):
        raise UsageError(f"{out} is not empty and not an engine folder; choose another --out")
    return path


@contextmanager
def replaced(out: str | Path) -> Iterator[tuple[Path, Path]]:
    """Give (``out`` resolved, an empty folder to fill), which takes the place of ``out`` at the end.

    An older folder there gives way only once the new one is whole. See `check_target` for the errors.
    """
    out = check_target(out)
    partial, old = (out.with_name(f".{out.name}.{suffix}") for suffix in ("partial", "old"))
    for left in (partial, old):
        if left.is_symlink():
            left.unlink()
        elif left.exists():
            shutil.rmtree(left)
    partial.mkdir(parents=True)
    try:
        yield out, partial
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        error.filename = error.filename or str(out)  # a full disk names no file
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model`` and check it."""
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)


def _write_graphs(backbone: Backbone, store: WeightStore, folder: Path, precision: str) -> None:
    def new() -> GraphBuilder:
        return GraphBuilder(backbone.config, store, precision)

    save_graph(graphs.embed_model(new()), folder / "embed.onnx")
    save_graph(graphs.embed_inline_model(new()), folder / "embed_inline.onnx")
    for i in range(backbone.config.n_layers):
        save_graph(graphs.layer_model(new(), i), folder / layer_file(i, "onnx"))
        save_graph(graphs.plain_layer_model(new(), i), folder / plain_layer_file(i))
    save_graph(graphs.head_model(new()), folder / "head.onnx")


def _write_whole_graphs(backbone: Backbone, store: WeightStore, folder: Path) -> list[str]:
    """Write the graphs that 'mp2 serve' runs for 'mp2 bbt --endpoint', over the same weights."""
    writers = {graphs.PREFIX_GRAPH: graphs.backbone_model, graphs.INLINE_GRAPH: graphs.backbone_inline_model}
    for name, write in writers.items():
        save_graph(write(GraphBuilder(backbone.config, store, "fp32")), folder / name)
    return list(writers)


def backbone_entry(backbone: Backbone) -> BackboneEntry:
    """Return what a manifest says of ``backbone``."""
    config = backbone.config
    return BackboneEntry(
        name=config.name,
        sha256=backbone.sha256,
        n_layers=config.n_layers,
        hidden=config.hidden,
        n_heads=config.n_heads,
        ffn=config.ffn,
        vocab_size=config.vocab_size,
        activation=config.activation,
        token_type=config.token_type,
    )


def versions() -> dict[str, str]:
    """Return the releases that a manifest names."""
    return {
        "mp2": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "onnx": version("onnx"),
        "onnxruntime": str(load_onnxruntime().__version__),  # whose package may be onnxruntime-gpu
    }


def _manifest(backbone: Backbone, folder: Path, precision: str) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        backbone=backbone_entry(backbone),
        max_tokens=backbone.config.max_positions,
        precision=precision,
        opset=OPSET,
        versions=versions(),
        files={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    )

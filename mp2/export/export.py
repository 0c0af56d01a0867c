"""Write an engine folder, compare it with torch, then give it its name."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch

from mp2 import __version__
from mp2.backbone import Backbone, Layer
from mp2.engine.folder import (
    MANIFEST,
    SCHEMA_VERSION,
    BackboneEntry,
    EngineFolder,
    Manifest,
    file_sha256,
    layer_file,
    looks_exported,
)
from mp2.errors import Mp2Error, UsageError
from mp2.export import graphs
from mp2.export.parity import Comparison, compare_folder, failed
from mp2.export.weights import WeightStore
from mp2.limits import check_new_folder

if TYPE_CHECKING:
    from mp2.prompts import PromptSet


def export_engine(
    backbone: Backbone,
    out: str | Path,
    *,
    prompts: PromptSet | None = None,
    report: Callable[[Comparison], None] = lambda comparison: None,
) -> EngineFolder:
    """Write ``backbone``'s engine folder to ``out``, which must be new, empty or an older engine folder.

    ``prompts``: bake their span head into the deployment graphs. ``report`` sees every comparison with
    torch as it is made. The folder is built under another name and renamed at the end: a killed export
    leaves nothing that looks whole.

    Raises Mp2Error if an output differs from torch (nothing is left at ``out``), UsageError if ``out`` holds
    something else.
    """
    out = check_target(out)
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        _write_files(backbone, partial, prompts)
        head = None if prompts is None else (prompts.span_weight.float(), prompts.span_bias.float())
        comparisons = []
        for comparison in compare_folder(partial, backbone, head):
            comparisons.append(comparison)
            report(comparison)
        bad = failed(comparisons)
        if bad:
            raise Mp2Error(
                f"{len(bad)} of {len(comparisons)} outputs differ from torch, first '{bad[0].name}': "
                f"{bad[0].max_rel:.1e} relative, expected at most {bad[0].tolerance:.0e}; "
                f"nothing was written to {out}"
            )
        manifest = folder_manifest(backbone, partial, prompts, "onnxruntime", "fp32")
        (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        put_in_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return EngineFolder(out, manifest)


def check_target(out: str | Path) -> Path:
    """Return ``out`` resolved; UsageError unless it is new, empty or an older engine folder.

    What is there gives way to the new folder as a whole, so it may not be where somebody works, nor above it.
    """
    check_new_folder(Path(out))
    path = Path(out).resolve()
    if path == Path.cwd() or path in Path.cwd().parents:
        raise UsageError(
            f"--out {out} is the working directory or a folder above it, which cannot be replaced; "
            "name a new folder"
        )
    if path.exists() and any(path.iterdir()) and not looks_exported(path):
        raise UsageError(f"{out} is not empty and not an engine folder; choose another --out")
    return path


def _write_files(backbone: Backbone, folder: Path, prompts: PromptSet | None) -> None:
    config, store = backbone.config, WeightStore(folder)
    store_embeddings(backbone, store)
    for i in range(config.n_layers):
        _store_layer(backbone, store, i)
    if prompts is not None:
        store.add("span_head.bin", "span_weight", prompts.span_weight.detach().numpy())
        store.add("span_head.bin", "span_bias", prompts.span_bias.detach().numpy())
    write_graphs(lambda: graphs.GraphBuilder(config, store), folder, baked_head=prompts is not None)


def write_graphs(new: Callable[[], graphs.GraphBuilder], folder: Path, *, baked_head: bool) -> None:
    """Write every graph of an engine folder, each with a ``new`` builder whose weights are stored."""
    save_graph(graphs.embed_model(new()), folder / "embed.onnx")
    save_graph(graphs.embed_inline_model(new()), folder / "embed_inline.onnx")
    for i in range(new().config.n_layers):
        save_graph(graphs.layer_model(new(), i), folder / layer_file(i, "onnx"))
    save_graph(graphs.head_model(new()), folder / "head.onnx")
    save_graph(graphs.backbone_model(new(), baked_head=baked_head), folder / "backbone.onnx")
    save_graph(graphs.backbone_inline_model(new(), baked_head=baked_head), folder / "backbone_inline.onnx")


def store_embeddings(backbone: Backbone, store: WeightStore) -> None:
    """Write the embedding tables and their norm, in float32."""
    encoder = backbone.encoder
    for name, tensor in (
        ("word_embeddings", encoder.word_embeddings.weight),
        ("position_embeddings", encoder.position_embeddings.weight),
        ("token_type_embedding", encoder.token_type_embeddings.weight[0]),
        ("embedding_norm.weight", encoder.embedding_norm.weight),
        ("embedding_norm.bias", encoder.embedding_norm.bias),
    ):
        store.add("embed.bin", name, tensor.detach().numpy())


def _store_layer(backbone: Backbone, store: WeightStore, index: int) -> None:
    layer, file, name = backbone.encoder.layers[index], layer_file(index, "bin"), f"layers.{index}"
    assert isinstance(layer, Layer)
    scale = backbone.config.head_size**-0.5  # folded into the query's weights: one pass over the scores less
    parts = ((layer.query, scale), (layer.key, 1.0), (layer.value, 1.0))
    with torch.no_grad():
        weight = torch.cat([part.weight * factor for part, factor in parts])
        bias = torch.cat([part.bias * factor for part, factor in parts])
        store.add(file, f"{name}.qkv.weight", weight.T.numpy())
        store.add(file, f"{name}.qkv.bias", bias.numpy())
        for part in ("attention_output", "intermediate", "output"):
            module = getattr(layer, part)
            store.add(file, f"{name}.{part}.weight", module.weight.T.numpy())
            store.add(file, f"{name}.{part}.bias", module.bias.numpy())
        for part in ("attention_norm", "output_norm"):
            module = getattr(layer, part)
            store.add(file, f"{name}.{part}.weight", module.weight.numpy())
            store.add(file, f"{name}.{part}.bias", module.bias.numpy())


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model`` and check it."""
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)


def folder_manifest(
    backbone: Backbone, folder: Path, prompts: PromptSet | None, runtime: str, precision: str
) -> Manifest:
    """Return the manifest of the files that lie in ``folder``."""
    config = backbone.config
    return Manifest(
        schema_version=SCHEMA_VERSION,
        backbone=BackboneEntry(
            name=config.name,
            sha256=backbone.sha256,
            n_layers=config.n_layers,
            hidden=config.hidden,
            n_heads=config.n_heads,
            ffn=config.ffn,
            vocab_size=config.vocab_size,
            activation=config.activation,
        ),
        max_tokens=config.max_positions,
        precision=precision,
        opset=graphs.OPSET,
        runtime=runtime,
        prompts_sha256=None if prompts is None else prompts.sha256,
        versions={
            "mp2": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "onnx", "onnxruntime")},
        },
        files={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    )


def put_in_place(partial: Path, out: Path) -> None:
    """Put ``partial`` at ``out``; an older engine folder there gives way only once the new one is whole."""
    old = out.with_name(f".{out.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)

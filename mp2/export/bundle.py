"""``mp2 export --run``: a bundle that answers several tasks on one backbone, without mp2.

A bundle is one graph of the backbone (two where shallow prompts are among the runs), the tokenizer and, for
each task, its card and its prompt as tensors. ``run.py`` in it needs onnxruntime, tokenizers and numpy. What
everything is called and means stands in docs/engines.md and in the README.md of the bundle.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import onnx
import torch
from safetensors.torch import save

from mp2.backbone import Backbone, load_backbone, resolve_device
from mp2.engine.bundle import BUNDLE_FORMAT, BUNDLE_SCHEMA_VERSION, Bundle
from mp2.engine.folder import MANIFEST, file_sha256
from mp2.engine.tensorrt.library import load_tensorrt
from mp2.engine.tensorrt.plans import SHAPES
from mp2.engine.tensorrt.profiles import TaskShapes
from mp2.errors import FormatError, MismatchError, Mp2Error, UnknownNameError, UsageError
from mp2.export.engine_folder import backbone_entry, check_target, replaced, save_graph, versions
from mp2.export.graphs import (
    INLINE_GRAPH,
    OPSET,
    PREFIX_GRAPH,
    GraphBuilder,
    backbone_inline_model,
    backbone_model,
)
from mp2.export.parity import REPORT_HEADER, Comparison, check, compare_whole, emulated_graph
from mp2.export.triton import TRITON, write_triton
from mp2.export.weights import store_backbone
from mp2.files import write_bytes, write_json
from mp2.prompts import PrefixProjector, load_prompts
from mp2.runs.frozen_model import default_prompts
from mp2.runs.run_folder import how_to_end, read_config
from mp2.runs.tuned import TunedMeta, check_fits, load_tuned
from mp2.tasks import MrcFormatter, TaskCard, load_card
from mp2.tasks.mrc import CLOSING, MIN_TEXT_TOKENS, SEPARATOR

if TYPE_CHECKING:
    from mp2.prompts import PromptSet

BUNDLE_PRECISIONS = ("fp32", "fp16", "bf16")
_ROWS = 32  # of a batch, and tokens up to which it is padded: what TensorRT plans are made for
_LENGTHS = (64, 128, 256)
_FILES = Path(__file__).with_name("bundle_files")
_WRITERS = {PREFIX_GRAPH: backbone_model, INLINE_GRAPH: backbone_inline_model}


@dataclass(frozen=True)
class TunedTask:
    """A run that goes into a bundle: what it tuned, and everything that its answers need."""

    run_dir: Path
    meta: TunedMeta
    card: TaskCard
    tensors: dict[str, torch.Tensor]  # the graph's inputs of one row, float32
    graph: str

    @property
    def prompt_length(self) -> int:
        """Its prompt's rows."""
        name = "prompt_keys" if self.graph == PREFIX_GRAPH else "prompt_rows"
        return int(self.tensors[name].shape[-2])


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
    loaded = _load(runs[0], backbone, revision)
    tasks = _named([_read_run(run, loaded, prompts) for run in runs])
    with replaced(out) as (out, folder):
        graphs = sorted({task.graph for task in tasks.values()})
        store = store_backbone(loaded, folder, precision, None)
        for graph in graphs:
            save_graph(_WRITERS[graph](GraphBuilder(loaded.config, store, precision)), folder / graph)
            try:
                compared = compare_whole(emulated_graph(folder / graph), loaded, precision, graph)
                check(compared, report, f"{graph} in {precision}")
            except Mp2Error as error:
                raise Mp2Error(f"{error}; nothing was written to {out}") from error
        (folder / "tokenizer.json").write_text(loaded.tokenizer.to_json(), encoding="utf-8")
        (folder / "tasks").mkdir()
        for name, task in tasks.items():
            write_bytes(folder / _tensors_file(name), save(task.tensors))
            write_json(folder / _card_file(name), _card(name, task, loaded))
        (folder / "run.py").write_bytes((_FILES / "run.py").read_bytes())
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

        compared = compare_whole(run, backbone, bundle.precision, graph)
        check(compared, report, f"the TensorRT plan of {graph} in {bundle.precision}")
    return plans


def bundle_command(
    runs: Sequence[str],
    out: str,
    backbone: str | None = None,
    prompts: str | None = None,
    runtime: str | None = None,
    precision: str | None = None,
    *,
    revision: str | None = None,
    triton: bool = False,
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, object]:
    """Do what ``mp2 export --run`` does, ``show`` the report line by line, and return it as JSON values.

    ``runtime`` tensorrt also builds a plan of each graph, ``triton`` writes a model repository.
    """
    if runtime not in (None, "onnxruntime", "tensorrt"):
        raise UnknownNameError("runtime", str(runtime), ("onnxruntime", "tensorrt"))
    if runtime == "tensorrt":  # before any work
        load_tensorrt()
        resolve_device("cuda")
    comparisons: list[Comparison] = []

    def report(comparison: Comparison) -> None:
        if not comparisons:
            show(REPORT_HEADER)
        comparisons.append(comparison)
        show(comparison.line())

    manifest = write_bundle(
        [Path(run) for run in runs],
        out,
        backbone=backbone,
        revision=revision,
        prompts=prompts,
        precision=precision or "fp32",
        report=report,
    )
    plans: dict[str, bytes] = {}
    if runtime == "tensorrt":
        loaded = _load(Path(runs[0]), backbone, revision)
        plans = build_bundle_plans(Bundle.open(out), loaded, report=report)
    if triton:
        models = ", ".join(folder.name for folder in write_triton(Bundle.open(out), plans))
        show(
            f"Triton model repository in {Path(out) / TRITON}: {models} (written, not run on a Triton server)"
        )
    n_bytes = sum((Path(out) / name).stat().st_size for name in manifest["files"])
    show(
        f"{len(comparisons)} outputs equal torch's within tolerance; {len(manifest['tasks'])} task(s) on "
        f"'{manifest['backbone']['name']}' in {out} ({n_bytes / 1e6:.1f} MB): {', '.join(manifest['tasks'])}"
    )
    parity = [{**asdict(c), "ok": c.ok} for c in comparisons]
    return {"out": str(Path(out).resolve()), "bytes": n_bytes, "manifest": manifest, "parity": parity}


def _load(run: Path, backbone: str | None, revision: str | None) -> Backbone:
    """The run's backbone, or the one that is named in its place."""
    config = read_config(run)
    revision = revision if backbone or revision else config.revision
    return load_backbone(backbone or config.backbone, revision=revision)


def _read_run(run_dir: Path, backbone: Backbone, prompts: str | None) -> TunedTask:
    config = read_config(run_dir)
    try:
        z, meta = load_tuned(run_dir / "prompt.safetensors")
        if (kind := meta.head.get("kind")) != "span":
            raise UsageError(
                f"{run_dir} reads its answers by the {kind} head, and bundles have the span head only: "
                "deploy it with 'mp2 predict', or tune with --head span"
            )
    except FormatError as error:
        raise FormatError(f"{error}; {how_to_end(run_dir)}") from error
    if meta.backbone_sha256 != backbone.sha256:
        raise MismatchError(
            f"{run_dir} was tuned on backbone '{meta.backbone}' (weights {meta.backbone_sha256[:12]}), "
            f"expected '{backbone.config.name}' (weights {backbone.sha256[:12]}): a bundle has one backbone; "
            "make one bundle for each, or name with --backbone where the runs' backbone is now"
        )
    prompt_set = load_prompts(prompts or default_prompts(config), backbone)
    check_fits(meta, backbone_sha256=backbone.sha256, prompts_sha256=prompt_set.sha256)
    if prompt_set.kind == "deep" and prompt_set.meta.injection != "prefix":
        raise UsageError(
            f"the deep prompts of {run_dir} were trained with inline injection, and graphs of whole "
            "backbones have keys and values only; tune with prompts trained with --injection prefix, or "
            "answer with 'mp2 predict'"
        )
    card = load_card(run_dir / "card.toml")
    MrcFormatter(card, backbone.tokenizer, meta.max_tokens)  # raises where labels cannot be spelled
    tensors = _tensors(backbone, prompt_set, torch.from_numpy(z))
    graph = PREFIX_GRAPH if "prompt_keys" in tensors else INLINE_GRAPH
    return TunedTask(run_dir, meta, card, tensors, graph)


def _tensors(backbone: Backbone, prompts: PromptSet, z: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs of a row of the batch, without its first axis, for the tuned ``z`` [L', d]."""
    projector = PrefixProjector(backbone.encoder, prompts)
    head = {"span_weight": prompts.span_weight.float(), "span_bias": prompts.span_bias.float()}
    if prompts.meta.n_inline:
        return {"prompt_rows": projector.inline(z)[0].float(), **head}  # [m, H]
    layers = [projector.keys_values(i, z[i : i + 1]) for i in range(len(z))]
    keys, values = (torch.cat(part).float() for part in zip(*layers, strict=True))  # [L, h, m, d_h]
    return {"prompt_keys": keys, "prompt_values": values, **head}


def _named(tasks: Sequence[TunedTask]) -> dict[str, TunedTask]:
    """Return the tasks by their cards' names, with the seed where runs share one; UsageError for twins."""
    cards = Counter(task.card.task for task in tasks)
    named: dict[str, TunedTask] = {}
    for task in tasks:
        name = task.card.task
        name = name if cards[name] == 1 else f"{name}-seed{task.meta.seed}"
        if name in named:
            raise UsageError(
                f"{named[name].run_dir} and {task.run_dir} are both runs of task '{task.card.task}' with "
                f"seed {task.meta.seed}: give one of them"
            )
        named[name] = task
    return named


def _tensors_file(name: str) -> str:
    return f"tasks/{name}.safetensors"


def _card_file(name: str) -> str:
    return f"tasks/{name}.json"


def _card(name: str, task: TunedTask, backbone: Backbone) -> dict[str, Any]:
    """Return what a task's JSON file holds: the card, and its text as token ids."""
    card, tokenizer = task.card, backbone.tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text).ids if text else []

    parts = [{"text": text, "ids": ids(text), "field": field} for text, field in card.parts]
    n_template = 2 + sum(len(ids(text)) for text, _ in card.parts)
    options = [{"label": label, "word": word, "ids": ids(word)} for label, word in card.labels.items()]
    closing = ids(CLOSING) if card.type != "extraction" else []
    return {
        "name": name,
        "task": card.task,
        "type": card.type,
        "template": card.template,
        "fields": list(card.fields),
        "parts": parts,
        "options": options,
        "before": [tokenizer.cls_id],
        "after": [tokenizer.sep_id],
        "separator": ids(SEPARATOR),
        "closing": closing,
        "max_tokens": task.meta.max_tokens,
        "room": task.meta.max_tokens - n_template - len(closing),
        "least_room": MIN_TEXT_TOKENS,
        "unanswerable": card.unanswerable,
        "max_answer_tokens": card.max_answer_tokens,
        "graph": task.graph,
        "head": "span",
        "prompt_length": task.prompt_length,
        "run": {"folder": task.run_dir.resolve().name, "seed": task.meta.seed, "selected": task.meta.at},
        "prompts": {"name": Path(task.meta.prompts).name, "sha256": task.meta.prompts_sha256},
    }


def _manifest(
    backbone: Backbone, folder: Path, tasks: dict[str, TunedTask], graphs: Sequence[str], precision: str
) -> dict[str, Any]:
    entries = {
        name: {
            "card": _card_file(name),
            "tensors": _tensors_file(name),
            "graph": task.graph,
            "head": "span",
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
        "heads": {
            "span": {"inputs": ["span_weight", "span_bias"], "outputs": ["start_logits", "end_logits"]}
        },
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
        f"| `{name}` | {entry['graph']} | {entry['prompt_length']} |"
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

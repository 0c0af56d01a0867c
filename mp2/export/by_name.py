"""``mp2 export``: load by name, write an engine folder or a bundle, report how it compares with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mp2.backbone import load_backbone, resolve_device
from mp2.engine.bundle import Bundle
from mp2.engine.folder import FOLDER_PRECISIONS, TYPED_PRECISIONS
from mp2.engine.tensorrt.library import load_tensorrt
from mp2.engine.tensorrt.profiles import TaskShapes
from mp2.errors import UnknownNameError, UsageError
from mp2.export.bundle import build_bundle_plans, write_bundle
from mp2.export.bundle_tasks import run_backbone
from mp2.export.emulated import EmulatedBackend
from mp2.export.engine_folder import check_target, export_engine, precision_cost
from mp2.export.input_maxima import calibration_inputs, task_inputs
from mp2.export.parity import REPORT_HEADER, Comparison
from mp2.export.triton import TRITON, write_triton
from mp2.json_files import parse_json
from mp2.messages import say
from mp2.runs.needs import say_what_it_loads, untyped
from mp2.runs.run_folder import read_config

if TYPE_CHECKING:
    from mp2.backbone import Backbone
    from mp2.prompts import PromptSet
    from mp2.tasks import MrcInput


def export_command(
    backbone: str,
    out: str,
    prompts: str | None = None,
    precision: str | None = None,
    *,
    revision: str | None = None,
    task: str | None = None,
    data: str | None = None,
    popsize: int | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, object]:
    """Do what ``mp2 export`` does, ``show`` the report line by line, and return it as JSON values.

    Engines that ONNX Runtime's TensorRT provider builds of a folder in fp16, bf16 or fp8 are tuned for
    populations of ``popsize`` (None: 20) on the few-shot set of ``task``.
    """
    precision = precision or "fp32"
    if precision not in FOLDER_PRECISIONS:
        raise UnknownNameError("precision", precision, FOLDER_PRECISIONS)
    typed = precision in TYPED_PRECISIONS
    if not typed and (task is not None or popsize is not None or prompts is not None):
        raise UsageError(f"--task, --popsize and --prompts are for --precision {', '.join(TYPED_PRECISIONS)}")
    if data is not None and task is None:
        raise UsageError("--data is read for a --task only; give both")
    popsize = 20 if popsize is None else popsize
    if popsize < 1:
        raise UsageError(f"popsize is {popsize}, expected at least 1")
    check_target(out)
    loaded = load_backbone(backbone, revision=revision)
    prompt_set = None
    if prompts is not None:
        from mp2.prompts import load_prompts

        prompt_set = load_prompts(prompts, loaded)
        if prompt_set.meta.on_placeholders:
            raise UsageError(
                f"the {prompt_set.kind} prompts in {prompts} were trained with {prompt_set.meta.injection} "
                "injection, the graphs have prefixes and word-embedding rows only: export without --prompts, "
                "or give prompts trained with the default --injection"
            )
    comparisons, report = _reporter(show)
    summary: dict[str, object] = {}
    if typed:
        inputs = calibration_inputs(loaded) if task is None else task_inputs(loaded, task, data)
        shapes = _shapes(loaded, prompt_set, inputs if task else None, popsize)
        folder = export_engine(
            loaded, out, precision=precision, prompts=prompt_set, shapes=shapes, report=report
        )
        cost = precision_cost(EmulatedBackend(loaded, folder.path, precision), loaded, prompt_set, inputs)
        show(f"{precision}, emulated on the CPU: {cost.line()}")
        summary = {"emulated_agreement": cost.as_dict()}
    else:
        folder = export_engine(loaded, out, report=report)
    n_bytes = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
    show(
        f"{len(comparisons)} outputs equal torch's within tolerance; "
        f"engine of '{loaded.config.name}' in {folder.path} "
        f"({len(folder.manifest.files)} files, {n_bytes / 1e6:.1f} MB)"
    )
    return {
        "out": str(folder.path),
        "bytes": n_bytes,
        "manifest": parse_json(folder.manifest.to_json()),
        "parity": [{**asdict(c), "ok": c.ok} for c in comparisons],
        **summary,
    }


def _reporter(show: Callable[[str], None]) -> tuple[list[Comparison], Callable[[Comparison], None]]:
    """Return a list, and what puts comparisons into it and shows them as a table."""
    comparisons: list[Comparison] = []

    def report(comparison: Comparison) -> None:
        if not comparisons:
            show(REPORT_HEADER)
        comparisons.append(comparison)
        show(comparison.line())

    return comparisons, report


def _shapes(
    backbone: Backbone, prompts: PromptSet | None, inputs: Sequence[MrcInput] | None, popsize: int
) -> TaskShapes:
    """Return the shapes of a task's ``inputs``; None: for any task."""
    m = 50 if prompts is None else prompts.meta.prompt_tokens
    shallow = prompts is not None and prompts.kind == "shallow"
    if inputs is None:
        top = backbone.config.max_positions
        lengths = tuple(sorted({min(length, top) for length in (64, 128, 256)}))
        return TaskShapes(candidates=popsize, lengths=lengths, prompt_tokens=m, shallow=shallow)
    own = [item.n_tokens for item in inputs]
    return TaskShapes.of_lengths(own, candidates=popsize, prompt_tokens=m, shallow=shallow)


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
    moved = {"backbone": backbone, "prompts": prompts}
    for run in map(Path, runs):
        say_what_it_loads(run, untyped(read_config(run), moved, tuple(moved)), say)
    comparisons, report = _reporter(show)
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
        loaded = run_backbone(Path(runs[0]), backbone, revision)
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

"""``mp2 export``: write an engine folder."""

from __future__ import annotations

from typing import Any

import click

from mp2.commands.options import Choice, config_options
from mp2.commands.paths import PATH
from mp2.commands.printing import as_json_text, tell
from mp2.errors import UsageError
from mp2.runs.config import BbtConfig


@click.command(short_help="Write ONNX graphs: a bundle of runs, or an engine.")
@click.option("--run", "first", type=PATH, help="Runs to write a bundle of: --run RUN [RUN ...].")
@click.argument("more", nargs=-1, type=PATH, metavar="[RUN]...")
@config_options(
    BbtConfig,
    only={
        "backbone": "A name (cpt-large ...), a folder or a hub id.",
        "revision": "Of a hub backbone: a branch, tag or commit.",
        "prompts": "fp16 and less: prompts that engines are tuned for. --run: where they are now.",
        "task": "fp16 and less: tune engines for this task's few-shot set.",
        "data": "Folder with TASK/train.jsonl; or MP2_DATA.",
        "popsize": "fp16 and less: population that engines are tuned for.  [default: 20]",
    },
)
@click.option("--out", required=True, type=PATH, help="Folder to write.")
@click.option(
    "--runtime",
    type=Choice("runtime", ("onnxruntime", "tensorrt")),
    help="--run: tensorrt also builds a plan of each graph on this GPU.  [default: onnxruntime]",
)
@click.option(
    "--precision",
    type=Choice("precision", ("fp32", "fp16", "bf16", "fp8")),
    help="fp32; for GPUs fp16, bf16, and without --run fp8.  [default: fp32]",
)
@click.option("--triton", is_flag=True, help="--run: write a Triton model repository, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(as_json: bool, first: str | None, more: tuple[str, ...], **options: Any) -> None:
    """Write a bundle that answers the tasks of finished runs without mp2 (--run), or an engine folder.

    An engine folder has the graphs of a backbone that 'mp2 bbt --engine' tunes with. Every output is compared
    with torch; exit 1 if one differs.
    """
    from mp2.export import bundle_command, export_command

    show = (lambda line: None) if as_json else tell
    if first is not None:
        engines_own = ("task", "data", "popsize")
        if wrong := [f"--{name.replace('_', '-')}" for name in engines_own if options[name]]:
            raise UsageError(
                f"{', '.join(wrong)}: for an engine folder, not for a bundle; drop --run or these"
            )
        options = {name: value for name, value in options.items() if name not in engines_own}
        summary = bundle_command([first, *more], **options, show=show)
    else:
        if more:
            raise UsageError(f"{more[0]}: expected options only; runs are given as --run RUN [RUN ...]")
        if options.pop("triton"):
            raise UsageError("--triton is for a bundle: give --run RUN")
        if options["backbone"] is None:
            raise UsageError("give --backbone NAME for an engine folder, or --run RUN for a bundle")
        if options.pop("runtime") == "tensorrt":
            raise UsageError(
                "--runtime tensorrt builds plans of a bundle: give --run RUN; an engine folder for TensorRT "
                "is one with --precision fp16, bf16 or fp8, and ONNX Runtime's provider builds its engines"
            )
        summary = export_command(**options, show=show)
    if as_json:
        click.echo(as_json_text(summary))

"""Engines and the machine they run on: ``mp2 export``, ``mp2 doctor``."""

from __future__ import annotations

from typing import Any

import click

from mp2.commands.printing import as_json_text


@click.command(short_help="Write an engine folder of ONNX graphs.")
@click.option("--backbone", required=True, help="A name (cpt-large, mini ...), a folder or a hub id.")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Engine folder to write.")
@click.option("--prompts", help="tensorrt: prompts that plans are tuned for and fp8 is calibrated under.")
@click.option("--runtime", default="onnxruntime", show_default=True, help="onnxruntime | tensorrt")
@click.option("--precision", help="fp32; with tensorrt fp16, bf16 or fp8.  [default: fp32; tensorrt: fp16]")
@click.option("--task", help="tensorrt: tune plans for this task's few-shot set.")
@click.option("--data", type=click.Path(), help="Folder with TASK/train.jsonl; or MP2_DATA.")
@click.option("--popsize", type=int, help="tensorrt: population plans are tuned for.  [default: 20]")
@click.option("--graphs-only", is_flag=True, help="tensorrt: build no plans, so that no GPU is needed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(as_json: bool, **options: Any) -> None:
    """Write an engine folder of ONNX graphs and compare every output with torch (exit 1 if one differs)."""
    from mp2.export import export_command

    show = (lambda line: None) if as_json else click.echo
    summary = export_command(**options, show=show)
    if as_json:
        click.echo(as_json_text(summary))


@click.command(short_help="Show what this machine has.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Show what this machine has: libraries, runtimes, devices, embedded weights, data."""
    from mp2.doctor import as_text, examine

    found = examine()
    click.echo(as_json_text(found) if as_json else as_text(found))

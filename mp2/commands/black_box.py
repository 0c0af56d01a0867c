"""Tuning without gradients, and labelling with what was tuned: ``mp2 bbt``, ``mp2 predict``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from mp2.commands.options import tuned_model
from mp2.commands.printing import as_json_text, given, note


@click.command(short_help="Tune prompts for a task without gradients.")
@click.option(
    "--task", multiple=True, help="A name of 'mp2 tasks', or your own card (a TOML file); again for more."
)
@tuned_model
@click.option("--iters", default=8000, show_default=True, help="Candidates evaluated, both stages together.")
@click.option(
    "--router-search",
    default="bits",
    show_default=True,
    metavar="METHOD",
    help="bits, exhaustive, bo, nevergrad:NAME, random or none.",
)
@click.option("--router-iters", type=int, help="Iterations of stage I.  [default: 100 deep, 200 shallow]")
@click.option("--router-only", is_flag=True, help="Stage I only.")
@click.option("--popsize", default=20, show_default=True, help="Population of CMA-ES.")
@click.option("--cma", default="full", show_default=True, help="full, or diagonal (cheaper).")
@click.option("--sigma-input", default=5e-2, show_default=True, help="First step size, layer 0, deep.")
@click.option("--sigma-deep", default=1e-2, show_default=True, help="First step size, other layers, deep.")
@click.option("--sigma-shallow", default=0.1, show_default=True, help="First step size, shallow.")
@click.option("--seed", type=int, help="Draws the few-shot split and drives the search.  [default: 8]")
@click.option("--seeds", metavar="8,13,...", help="Several seeds, a run each, done together.")
@click.option("--shots", type=int, help="Examples a label (in all, if the task has no labels).")
@click.option("--max-tokens", type=int, help="Longest sequence.  [default: what the backbone allows]")
@click.option("--engine", type=click.Path(), help="Engine folder of 'mp2 export'.")
@click.option(
    "--runtime",
    default="auto",
    show_default=True,
    help="auto, torch, onnxruntime, onnxruntime-tensorrt or tensorrt.",
)
@click.option(
    "--precision", default="auto", show_default=True, help="fp32, bf16, int8; on a GPU fp32, fp16, bf16, fp8."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--threads", type=int, help="Threads of the runtime.  [default: its own choice]")
@click.option("--no-test", is_flag=True, help="Do not score the test set.")
@click.option("--test-limit", type=int, help="Score the first N test examples only.")
@click.option(
    "--out", type=click.Path(), default="runs", show_default=True, help="Where run folders are made."
)
@click.option(
    "--resume",
    type=click.Path(),
    multiple=True,
    metavar="RUNDIR",
    help="Go on with a run that was cut off; again for more, or a folder of runs.",
)
@click.option("--explain", is_flag=True, help="Print the plan of the run; tune nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (a list if several).")
@click.pass_context
def bbt(ctx: click.Context, /, **options: Any) -> None:
    """Tune prompts for a task without gradients: search the router, then CMA-ES layer by layer."""
    from mp2.runs.command import asks_for_many, bbt_plan, bbt_results
    from mp2.runs.report import result_table, series_table

    if options.pop("explain"):
        plan, rows = bbt_plan(options, given(ctx))
        text = "\n".join(f"{name:10}{words}" for name, words in rows)
        click.echo(as_json_text(plan) if options["as_json"] else text)
        return
    results = []
    try:
        for result in bbt_results(options, given(ctx)):
            results.append(result)
            if not options["as_json"]:
                click.echo(result_table(result))
    except KeyboardInterrupt:
        sys.exit(130)
    if options["as_json"]:
        click.echo(as_json_text(results if asks_for_many(options) else results[0]))
    elif len(results) > 1:
        click.echo(series_table(results))


@click.command(short_help="Label new text with a tuned prompt.")
@click.option(
    "--run", "run_dir", type=click.Path(), required=True, help="Folder of a finished 'mp2 bbt' run."
)
@click.option("--input", "source", required=True, metavar="FILE|-", help="JSON lines, or plain text lines.")
@click.option("--backbone", help="Where the run's backbone is now.  [default: where it was]")
@click.option("--prompts", help="Where the run's modular prompts are now.  [default: where they were]")
@click.option("--engine", type=click.Path(), help="Engine folder.  [default: the run's]")
@click.option("--runtime", help="As of 'mp2 bbt'.  [default: the run's, if it is here]")
@click.option("--precision", help="As of 'mp2 bbt'.  [default: the run's, if it is here]")
@click.option("--device", help="As of 'mp2 bbt'.  [default: the run's, if it is here]")
def predict(run_dir: str, source: str, **options: str | None) -> None:
    """Label new text with a tuned prompt; a JSON line each, with its probability."""
    from mp2.runs.predict import predict_file

    for found in predict_file(Path(run_dir), source, sys.stdin.buffer, **options, note=note):
        click.echo(json.dumps(found, ensure_ascii=False))

"""The command line: every command parses, calls one function and prints; no logic lives here.

Exit status: 0 done, 1 the work failed, 2 the command was typed wrong or its input is bad.
Results go to stdout (``--json`` for machines), progress and log to stderr.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from mp2 import __version__
from mp2.errors import Mp2Error


class _Group(click.Group):
    """A group that prints ``Mp2Error`` as one message and exits with the error's own status."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except Mp2Error as error:
            click.echo(f"mp2: {error}", err=True)
            sys.exit(error.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mp2")
def main() -> None:
    """Tune a frozen language model for a new task from 32 examples, without gradients."""


@main.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def tasks(ctx: click.Context, as_json: bool) -> None:
    """List the tasks; 'show' one, 'check' your own."""
    if ctx.invoked_subcommand is None:
        from mp2.tasks.show import task_rows, task_table

        click.echo(_json(task_rows()) if as_json else task_table())


@tasks.command("show")
@click.argument("name")
@click.option("--backbone", help="Count tokens with this backbone's tokenizer.  [default: mini]")
@click.option("--data", type=click.Path(), help="Folder with NAME/train.jsonl; or MP2_DATA.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tasks_show(name: str, backbone: str | None, data: str | None, as_json: bool) -> None:
    """Show a task card (a name or a TOML file), an example written out, and token lengths."""
    from mp2.tasks.show import view_task

    view = view_task(name, data, backbone)
    click.echo(_json(view.as_dict()) if as_json else str(view))


@tasks.command("check")
@click.argument("card")
@click.option("--data", type=click.Path(), help="Folder with <task>/{train,dev,test}.jsonl; or MP2_DATA.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tasks_check(card: str, data: str | None, as_json: bool) -> None:
    """Check a card (a TOML file or a name) and its data; report every problem, exit 2 if there are any."""
    from mp2.tasks.check import check_task

    report = check_task(card, data)
    click.echo(_json(report.as_dict()) if as_json else str(report))
    sys.exit(0 if report.ok else 2)


@main.command()
@click.option(
    "--task", multiple=True, help="A name of 'mp2 tasks', or your own card (a TOML file); again for more."
)
@click.option("--data", type=click.Path(), help="Folder with TASK/{train,test}.jsonl; or MP2_DATA.")
@click.option("--backbone", default="mini", show_default=True, help="mini, cpt-large, a folder, or a hub id.")
@click.option(
    "--prompts", help="Modular prompts: a file, mini-deep or mini-shallow.  [default: the backbone's]"
)
@click.option("--deep", "kind", flag_value="deep", help="Prompts at every layer.  [default]")
@click.option("--shallow", "kind", flag_value="shallow", help="Prompts at the input only.")
@click.option("--iters", default=8000, show_default=True, help="Candidates evaluated, both stages together.")
@click.option(
    "--router-search",
    default="bits",
    show_default=True,
    metavar="METHOD",
    help="bits, flips, exhaustive, bo, nevergrad:NAME, random or none.",
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
@click.option("--explain", is_flag=True, help="Print the plan and how long the run would take; tune nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (a list if several).")
@click.pass_context
def bbt(ctx: click.Context, /, **options: Any) -> None:
    """Tune prompts for a task without gradients: search the router, then CMA-ES layer by layer."""
    from mp2.optimizers.command import asks_for_many, bbt_plan, bbt_results, given_options
    from mp2.optimizers.report import result_table, series_table

    if options.pop("explain"):
        from mp2.optimizers.explain import plan_table

        plan, n_seeds = bbt_plan(options)
        click.echo(_json(plan.as_dict()) if options["as_json"] else plan_table(plan, n_seeds))
        return
    results = []
    try:
        for result in bbt_results(options, given_options(ctx)):
            results.append(result)
            if not options["as_json"]:
                click.echo(result_table(result))
    except KeyboardInterrupt:
        sys.exit(130)
    if options["as_json"]:
        click.echo(_json(results if asks_for_many(options) else results[0]))
    elif len(results) > 1:
        click.echo(series_table(results))


@main.command()
@click.option(
    "--run", "run_dir", type=click.Path(), required=True, help="Folder of a finished 'mp2 bbt' run."
)
@click.option("--input", "source", required=True, metavar="FILE|-", help="JSON lines, or plain text lines.")
def predict(run_dir: str, source: str) -> None:
    """Label new text with a tuned prompt; a JSON line each, with its probability."""
    from mp2.optimizers.predict import predict_file

    for found in predict_file(Path(run_dir), source, sys.stdin.buffer):
        click.echo(json.dumps(found, ensure_ascii=False))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Show what this machine has: libraries, runtimes, devices, embedded weights, data."""
    from mp2.doctor import as_text, examine

    found = examine()
    click.echo(_json(found) if as_json else as_text(found))


@main.command()
@click.option("--backbone", required=True, help="A name (cpt-large, mini ...), a folder or a hub id.")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Engine folder to write.")
@click.option("--prompts", help="Prompt file whose span head is baked into the deployment graphs.")
@click.option("--runtime", default="onnxruntime", show_default=True, help="onnxruntime | tensorrt")
@click.option("--precision", help="fp32; with tensorrt fp16, bf16 or fp8.  [default: fp32; tensorrt: fp16]")
@click.option("--task", help="tensorrt: tune plans for this task's few-shot set.")
@click.option("--data", type=click.Path(), help="Folder with TASK/train.jsonl; or MP2_DATA.")
@click.option("--popsize", default=20, show_default=True, help="tensorrt: population plans are tuned for.")
@click.option("--graphs-only", is_flag=True, help="tensorrt: build no plans, so that no GPU is needed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(as_json: bool, **options: Any) -> None:
    """Write an engine folder of ONNX graphs and compare every output with torch (exit 1 if one differs)."""
    from mp2.export import export_command

    show = (lambda line: None) if as_json else click.echo
    summary = export_command(**options, show=show)
    if as_json:
        click.echo(_json(summary))


@main.command("pretrain-backbone")
@click.option("--corpus", required=True, type=click.Path(), help="Folder of *.txt or *.txt.xz files.")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder to write and resume in.")
@click.option("--layers", "n_layers", default=4, show_default=True, help="Layers L.")
@click.option("--hidden", default=128, show_default=True, help="Hidden size H.")
@click.option("--heads", "n_heads", default=4, show_default=True, help="Attention heads h.")
@click.option("--vocab-size", default=5300, show_default=True, help="Tokens of the character vocabulary.")
@click.option("--max-positions", default=256, show_default=True, help="Longest sequence of the backbone.")
@click.option("--length", default=128, show_default=True, help="Tokens a training sequence.")
@click.option("--steps", default=3600, show_default=True, help="Optimizer steps.")
@click.option("--batch-size", default=32, show_default=True, help="Sequences a step.")
@click.option("--lr", "learning_rate", default=1e-3, show_default=True, help="Peak learning rate.")
@click.option("--masking", default="char", show_default=True, help="char, or span (runs of characters).")
@click.option("--precision", default="bf16", show_default=True, help="fp32 or bf16 (autocast).")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--compile/--no-compile", "compiled", default=None, help="torch.compile.  [default: on GPUs]")
@click.option("--checkpoint-minutes", default=5.0, show_default=True, help="Minutes between checkpoints.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=int, help="CPU threads.  [default: torch's choice]")
def pretrain_backbone(
    corpus: str, out: str, device: str, threads: int | None, compiled: bool | None, **options: Any
) -> None:
    """Train a backbone by masked language modelling on plain text; restartable, alone or by torchrun."""
    from mp2.training import MlmConfig, is_main, train_mlm

    config = MlmConfig(ffn=4 * options["hidden"], **options)
    backbone = train_mlm(
        Path(corpus),
        Path(out),
        config,
        log=_note,
        device=device,
        threads=threads,
        compiled=compiled,
        command=_typed(),
    )
    if is_main():
        click.echo(f"{out}: {backbone.name}, {backbone.sha256[:12]}")


@main.command("pseudo-tasks")
@click.option("--corpus", required=True, type=click.Path(), help="Folder of *.txt or *.txt.xz files.")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder to make.")
@click.option("--examples", default=40_000, show_default=True, help="Training examples a task, at most.")
@click.option("--dev", default=300, show_default=True, help="Dev examples a task.")
@click.option("--files", type=int, help="First files of the corpus to read.  [default: all]")
@click.option("--seed", default=0, show_default=True)
def pseudo_tasks(corpus: str, out: str, **options: Any) -> None:
    """Cut tasks out of plain text (cards and data for mp2 pretrain): no labels needed."""
    from mp2.training.pseudo_tasks import make_pseudo_tasks

    made = make_pseudo_tasks(Path(corpus), Path(out), log=_note, **options)
    click.echo(f"{out}: {len(made)} tasks, {sum(made.values()):,} training examples")


@main.command()
@click.option(
    "--tasks",
    "names",
    multiple=True,
    metavar="TASK ...",
    help="Names or cards, as many as you like: --tasks my/*.toml.  [default: all that have data]",
)
@click.argument("more", nargs=-1, metavar="")
@click.option("--data", type=click.Path(), help="Folder with TASK/{train,dev}.jsonl; or MP2_DATA.")
@click.option("--backbone", default="mini", show_default=True, help="mini, cpt-large, a folder, or a hub id.")
@click.option("--out", type=click.Path(file_okay=False), help="Folder to write; a run in it goes on.")
@click.option(
    "--resume", type=click.Path(), metavar="DIR", help="Go on with the run in DIR as it was asked for."
)
@click.option("--deep", "kind", flag_value="deep", default="deep", help="Prompts at every layer.  [default]")
@click.option("--shallow", "kind", flag_value="shallow", help="Prompts at the input only.")
@click.option(
    "--injection", type=click.Choice(["prefix", "inline"]), help="Of deep prompts.  [default: prefix]"
)
@click.option("--router-inference", default="hard", show_default=True, help="hard (w > 0), or soft.")
@click.option(
    "--router-normalisation", default="count", show_default=True, help="Divide by count (K), or sum."
)
@click.option("--init", type=click.Path(), help="Prompt file to start from.")
@click.option("--modules", "n_modules", default=8, show_default=True, help="Modules K.")
@click.option("--prompt-tokens", default=50, show_default=True, help="Prompt tokens m.")
@click.option("--intrinsic-dim", default=300, show_default=True, help="Intrinsic dimensions d.")
@click.option("--steps", default=1_000_000, show_default=True, help="Optimizer steps.")
@click.option("--batch-size", default=32, show_default=True, help="Examples a step, all of one task.")
@click.option("--router-lr", type=float, help="Rate of the routers.  [default: 5e-4 deep, 1e-3 shallow]")
@click.option("--prompt-lr", type=float, help="Rate of z, A, head.  [default: 1e-4 deep, 1e-3 shallow]")
@click.option("--backbone-lr", default=0.0, show_default=True, help="Above 0: train the backbone too.")
@click.option("--schedule", default="constant", show_default=True, type=click.Choice(["constant", "linear"]))
@click.option("--warmup-steps", default=0, show_default=True, help="Linear warm-up.")
@click.option("--temperature", default=1.0, show_default=True, help="Of the relaxed Bernoulli routers.")
@click.option("--temperature-end", type=float, help="Anneal to this, geometrically.  [default: constant]")
@click.option("--max-tokens", default=512, show_default=True, help="Longest sequence.")
@click.option("--rotated", is_flag=True, help="Also train twins: the next option is right.")
@click.option("--shuffle-options", is_flag=True, help="Options of a training example in an order of its own.")
@click.option("--precision", default="fp32", show_default=True, help="fp32 or bf16 (autocast).")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--dev-limit", default=300, show_default=True, help="Dev examples scored a task.")
@click.option("--eval-every", default=0, help="Steps between dev scores.  [default: before and after only]")
@click.option("--checkpoint-minutes", default=5.0, show_default=True, help="Minutes between checkpoints.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=int, help="CPU threads.  [default: torch's choice]")
@click.pass_context
def pretrain(ctx: click.Context, /, device: str, threads: int | None, **options: Any) -> None:
    """Pre-train modular prompts and routers on many tasks by gradient; restartable, alone or by torchrun."""
    from mp2.training import asked_run, pretrain_command

    inputs, config, out = asked_run(options, _given(ctx), _typed())
    pretrain_command(inputs, config, out, device, threads, log=_note, show=click.echo)


def _given(ctx: click.Context) -> set[str]:
    """Names of the options that stand on the command line."""
    source = click.core.ParameterSource.COMMANDLINE
    return {name for name in ctx.params if ctx.get_parameter_source(name) is source}


def _typed() -> str:
    """What was typed, for people to read and to type again."""
    return shlex.join(["mp2", *sys.argv[1:]])


@main.command()
@click.option("--backbone", default="mini", show_default=True, help="mini, cpt-large, a folder, or a hub id.")
@click.option("--like", default="mini-deep", show_default=True, help="Prompts whose shape and head to take.")
@click.option("--seed", default=8, show_default=True, help="Draws the random projections.")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="Prompt file to write.")
def scratch(backbone: str, like: str, seed: int, out: str) -> None:
    """Write untrained prompts; 'mp2 bbt --router-search none' on them is BBTv2 (deep) or BBT (shallow)."""
    from mp2.training.scratch import scratch_command

    meta = scratch_command(backbone, like, seed, Path(out)).meta
    click.echo(f"{out}: {meta.kind}, m = {meta.prompt_tokens}, d = {meta.intrinsic_dim}, random projections")


@main.command()
@click.option("--task", required=True, help="A name of 'mp2 tasks', or your own card (a TOML file).")
@click.option("--data", type=click.Path(), help="Folder with TASK/{train,test}.jsonl; or MP2_DATA.")
@click.option("--backbone", default="mini", show_default=True, help="mini, cpt-large, a folder, or a hub id.")
@click.option(
    "--prompts", help="Modular prompts: a file, mini-deep or mini-shallow.  [default: the backbone's]"
)
@click.option("--deep", "kind", flag_value="deep", help="Prompts at every layer.  [default]")
@click.option("--shallow", "kind", flag_value="shallow", help="Prompts at the input only.")
@click.option(
    "--injection", type=click.Choice(["prefix", "inline"]), help="Of deep prompts.  [default: the file's]"
)
@click.option("--epochs", default=1000, show_default=True, help="Both stages together.")
@click.option(
    "--router-epochs", type=int, help="Of stage I; 0: every module on.  [default: half of --epochs]"
)
@click.option("--router-lr", type=float, help="Rate of stage I.  [default: 3e-3 deep, 1e-2 shallow]")
@click.option("--prompt-lr", type=float, help="Rate of stage II.  [default: 2e-5 deep, 3e-4 shallow]")
@click.option("--batch-size", default=32, show_default=True, help="Examples a step.")
@click.option("--router-only", is_flag=True, help="Stage I only.")
@click.option("--seed", type=int, help="Draws the few-shot split and drives training.  [default: 8]")
@click.option("--seeds", metavar="8,13,...", help="Several seeds, a run each.")
@click.option("--shots", type=int, help="Examples a label (in all, if the task has no labels).")
@click.option("--max-tokens", type=int, help="Longest sequence.  [default: what the backbone allows]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option("--threads", type=int, help="CPU threads.  [default: torch's choice]")
@click.option("--no-test", is_flag=True, help="Do not score the test set.")
@click.option("--test-limit", type=int, help="Score the first N test examples only.")
@click.option(
    "--out", type=click.Path(), default="runs", show_default=True, help="Where run folders are made."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (a list with --seeds).")
def tune(**options: Any) -> None:
    """Tune prompts for a task by gradient: the router, then the prompts it selects (two-stage, Adam)."""
    from mp2.optimizers.report import result_table, series_table
    from mp2.training.tune_run import tune_results

    results = []
    for result in tune_results(options):
        results.append(result)
        if not options["as_json"]:
            click.echo(result_table(result))
    if options["as_json"]:
        click.echo(_json(results if options["seeds"] else results[0]))
    elif len(results) > 1:
        click.echo(series_table(results))


def _note(line: str) -> None:
    click.echo(line, err=True)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


if __name__ == "__main__":
    main()

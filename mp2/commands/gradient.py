"""Work by gradient: ``mp2 pretrain-backbone``, ``mp2 pretrain``, ``mp2 tune``, and prompts for baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mp2.commands.options import prompt_kind, tuned_model
from mp2.commands.printing import as_json_text, given, note, typed


@click.command("pretrain-backbone", short_help="Train a backbone on plain text.")
@click.option("--corpus", required=True, type=click.Path(), help="Folder of *.txt or *.txt.xz files.")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder to write and resume in.")
@click.option(
    "--from",
    "start",
    type=click.Path(file_okay=False),
    help="Folder of a run to go on from, as a branch of it.",
)
@click.option("--layers", "n_layers", default=4, show_default=True, help="Layers L.")
@click.option("--hidden", default=128, show_default=True, help="Hidden size H.")
@click.option("--heads", "n_heads", default=4, show_default=True, help="Attention heads h.")
@click.option("--vocab-size", default=5300, show_default=True, help="Tokens of the character vocabulary.")
@click.option("--max-positions", default=256, show_default=True, help="Longest sequence of the backbone.")
@click.option("--length", default=128, show_default=True, help="Tokens a training sequence.")
@click.option("--steps", default=3600, show_default=True, help="Optimizer steps.")
@click.option("--batch-size", default=32, show_default=True, help="Sequences a step.")
@click.option("--lr", "learning_rate", default=1e-3, show_default=True, help="Peak learning rate.")
@click.option("--warmup-steps", type=int, help="Steps in which the rate rises to it.  [default: 5 %]")
@click.option("--decay-steps", type=int, help="Last steps in which it falls to 0.  [default: all the rest]")
@click.option(
    "--masking", default="char", show_default=True, help="char, span (runs of characters) or mixed."
)
@click.option("--mask-rate", default=0.15, show_default=True, help="Share of the tokens that are predicted.")
@click.option(
    "--contrastive", default=0.0, show_default=True, help="Weight of pulling neighbouring passages together."
)
@click.option("--precision", default="bf16", show_default=True, help="fp32 or bf16 (autocast).")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--compile/--no-compile", "compiled", default=None, help="torch.compile.  [default: on GPUs]")
@click.option("--checkpoint-minutes", default=5.0, show_default=True, help="Minutes between checkpoints.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=int, help="CPU threads.  [default: torch's choice]")
def pretrain_backbone(
    corpus: str,
    out: str,
    start: str | None,
    device: str,
    threads: int | None,
    compiled: bool | None,
    **options: Any,
) -> None:
    """Train a backbone by masked language modelling on plain text; restartable, alone or by torchrun."""
    from mp2.training import MlmConfig, is_main, train_mlm

    config = MlmConfig(ffn=4 * options["hidden"], **options)
    backbone = train_mlm(
        Path(corpus),
        Path(out),
        config,
        log=note,
        start=start,
        device=device,
        threads=threads,
        compiled=compiled,
        command=typed(),
    )
    if is_main():
        click.echo(f"{out}: {backbone.name}, {backbone.sha256[:12]}")


@click.command(short_help="Pre-train modular prompts on many tasks.")
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
@prompt_kind
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

    options["kind"] = options["kind"] or "deep"
    inputs, config, out = asked_run(options, given(ctx), typed())
    pretrain_command(inputs, config, out, device, threads, log=note, show=click.echo)


@click.command(short_help="Write untrained prompts (BBT, BBTv2).")
@click.option("--backbone", default="mini", show_default=True, help="mini, cpt-large, a folder, or a hub id.")
@click.option("--like", default="mini-deep", show_default=True, help="Prompts whose shape and head to take.")
@click.option("--seed", default=8, show_default=True, help="Draws the random projections.")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="Prompt file to write.")
def scratch(backbone: str, like: str, seed: int, out: str) -> None:
    """Write untrained prompts; 'mp2 bbt --router-search none' on them is BBTv2 (deep) or BBT (shallow)."""
    from mp2.training.scratch import scratch_command

    meta = scratch_command(backbone, like, seed, Path(out)).meta
    click.echo(f"{out}: {meta.kind}, m = {meta.prompt_tokens}, d = {meta.intrinsic_dim}, random projections")


@click.command(short_help="Tune prompts for a task by gradient.")
@click.option("--task", required=True, help="A name of 'mp2 tasks', or your own card (a TOML file).")
@tuned_model
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
    from mp2.runs.report import result_table, series_table
    from mp2.training.tune_run import tune_results

    results = []
    for result in tune_results(options):
        results.append(result)
        if not options["as_json"]:
            click.echo(result_table(result))
    if options["as_json"]:
        click.echo(as_json_text(results if options["seeds"] else results[0]))
    elif len(results) > 1:
        click.echo(series_table(results))

"""``mp2 pretrain``: pre-train modular prompts on many tasks."""

from __future__ import annotations

from typing import Any

import click

from mp2.commands.options import DEVICE, TASK, config_options, field_values, named_tasks
from mp2.commands.paths import PATH
from mp2.commands.printing import given, notes, quiet_option, tell, typed
from mp2.runs.config import BbtConfig
from mp2.training.config import PretrainConfig


@click.command(short_help="Pre-train modular prompts on many tasks.")
@click.option(
    "--tasks",
    "names",
    multiple=True,
    type=TASK,
    metavar="TASK ...",
    help="Names or cards, with commas or spaces: --tasks my/*.toml.  [default: all that have data]",
)
@click.argument("more", nargs=-1, metavar="", type=TASK)
@click.option("--data", type=PATH, help="Folder with TASK/{train,dev}.jsonl; or MP2_DATA.")
@click.option("--corpus", type=PATH, help="Of --method ppt: folder of *.txt or *.txt.xz.")
@config_options(BbtConfig, keep=("backbone", "revision"))
@click.option("--out", type=PATH, help="Folder to write; a run in it goes on.")
@click.option("--resume", type=PATH, metavar="DIR", help="Go on with the run in DIR as it was asked for.")
@click.option("--init", type=PATH, help="Prompt file to start from.")
@config_options(PretrainConfig)
@click.option("--device", type=DEVICE, default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--threads", type=int, help="CPU threads.  [default: torch's choice]")
@quiet_option
@click.pass_context
def pretrain(ctx: click.Context, /, device: str, threads: int | None, quiet: bool, **options: Any) -> None:
    """Pre-train modular prompts and routers on many tasks by gradient; restartable, alone or by torchrun.

    --method has the prompts that MP2 is compared with: spot (one soft prompt, same tasks), ppt (one soft
    prompt, next-sentence selection on plain text), and head (a span head without prompts).
    """
    from mp2.training.pretrain_run import asked_run, pretrain_command

    names = ("names", "more", "data", "corpus", "backbone", "revision", "out", "resume", "init")
    asked = {name: options[name] for name in names} | field_values(PretrainConfig, options)
    asked |= {"names": named_tasks((*options["names"], *options["more"])), "more": ()}
    inputs, config, out = asked_run(asked, given(ctx) - {"quiet"}, typed())
    resumed = options["resume"] is not None
    pretrain_command(inputs, config, out, device, threads, resumed=resumed, log=notes(quiet), show=tell)

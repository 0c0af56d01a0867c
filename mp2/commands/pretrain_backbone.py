"""``mp2 pretrain-backbone``: train a backbone on plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mp2.commands.options import DEVICE, build, config_options
from mp2.commands.paths import PATH
from mp2.commands.printing import notes, quiet_option, tell, typed
from mp2.training.config import MlmConfig


@click.command("pretrain-backbone", short_help="Train a backbone on plain text.")
@click.option("--corpus", required=True, type=PATH, help="Folder of *.txt or *.txt.xz files.")
@click.option("--out", required=True, type=PATH, help="Folder to write and resume in.")
@click.option(
    "--from",
    "start",
    type=PATH,
    help="Folder of a run to go on from, as a branch of it.",
)
@config_options(MlmConfig)
@click.option("--device", type=DEVICE, default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--compile/--no-compile", "compiled", default=None, help="torch.compile.  [default: on GPUs]")
@click.option("--threads", type=int, help="CPU threads.  [default: torch's choice]")
@quiet_option
def pretrain_backbone(
    corpus: str,
    out: str,
    start: str | None,
    device: str,
    compiled: bool | None,
    threads: int | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a backbone by masked language modelling on plain text; restartable, alone or by torchrun."""
    from mp2.training.mlm_trainer import train_mlm
    from mp2.training.ranks import is_main

    config = build(MlmConfig, options, ffn=4 * options["hidden"])
    backbone = train_mlm(
        Path(corpus),
        Path(out),
        config,
        log=notes(quiet),
        start=start,
        device=device,
        threads=threads,
        compiled=compiled,
        command=typed(),
    )
    if is_main():
        tell(f"{out}: {backbone.name}, {backbone.sha256[:12]}")

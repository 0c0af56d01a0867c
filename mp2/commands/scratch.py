"""``mp2 scratch``: untrained prompts, for baselines."""

from __future__ import annotations

from pathlib import Path

import click

from mp2.commands.options import BACKBONE


@click.command(short_help="Write untrained prompts (BBT, BBTv2).")
@click.option(
    "--backbone",
    default="mini",
    show_default=True,
    type=BACKBONE,
    help="mini, cpt-large, a folder, or a hub id.",
)
@click.option("--like", default="mini-deep", show_default=True, help="Prompts whose shape and head to take.")
@click.option("--seed", default=8, show_default=True, help="Draws the random projections.")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="Prompt file to write.")
def scratch(backbone: str, like: str, seed: int, out: str) -> None:
    """Write untrained prompts; 'mp2 bbt --router-search none' on them is BBTv2 (deep) or BBT (shallow)."""
    from mp2.training.scratch import scratch_command

    meta = scratch_command(backbone, like, seed, Path(out)).meta
    click.echo(f"{out}: {meta.kind}, m = {meta.prompt_tokens}, d = {meta.intrinsic_dim}, random projections")

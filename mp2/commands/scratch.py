"""``mp2 scratch``: untrained prompts, for baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from mp2.commands.options import PROMPTS, config_options
from mp2.commands.paths import PATH
from mp2.commands.printing import tell
from mp2.errors import UsageError
from mp2.runs.config import BbtConfig


@click.command(short_help="Write untrained prompts.")
@config_options(BbtConfig, keep=("backbone", "revision"))
@click.option(
    "--like", type=PROMPTS, help="Prompts whose shape and span head to take.  [default: mini-deep for mini]"
)
@click.option("--deep", "kind", flag_value="deep", help="Without --like: prompts at every layer (BBTv2).")
@click.option("--shallow", "kind", flag_value="shallow", help="Without --like: at the input only (BBT).")
@click.option(
    "--head", type=PROMPTS, help="Prompts whose span head to take (mp2 pretrain --method head, mp2 tune)."
)
@click.option("--seed", default=8, show_default=True, help="Draws the random projections.")
@click.option("--out", required=True, type=PATH, help="Prompt file to write.")
def scratch(
    backbone: str,
    revision: str | None,
    like: str | None,
    kind: Literal["deep", "shallow"] | None,
    head: str | None,
    seed: int,
    out: str,
) -> None:
    """Write untrained prompts for any backbone, to search from ('mp2 bbt --method bbtv2' is BBTv2 itself)."""
    from mp2.runs.scratch import scratch_command

    if like and kind:
        raise UsageError(f"--like {like} says the kind of prompts: drop --{kind}")
    if like is None and kind is None and backbone == "mini":
        like = "mini-deep"
    meta = scratch_command(backbone, like, kind or "deep", seed, Path(out), revision=revision, head=head).meta
    tell(f"{out}: {meta.kind}, m = {meta.prompt_tokens}, d = {meta.intrinsic_dim}, random projections")

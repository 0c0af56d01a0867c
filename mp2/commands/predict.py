"""``mp2 predict``: label new text with a tuned prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from mp2.commands.options import config_options
from mp2.commands.printing import note
from mp2.runs.config import BbtConfig

_HERE = "[default: the run's, if it is here]"


@click.command(short_help="Label new text with a tuned prompt.")
@click.option(
    "--run", "run_dir", type=click.Path(), required=True, help="Folder of a finished 'mp2 bbt' run."
)
@click.option("--input", "source", required=True, metavar="FILE|-", help="JSON lines, or plain text lines.")
@config_options(
    BbtConfig,
    only={
        "backbone": "Where the run's backbone is now.  [default: where it was]",
        "revision": "Of a hub backbone.  [default: the run's]",
        "prompts": "Where the run's modular prompts are now.  [default: where they were]",
        "engine": "Engine folder.  [default: the run's]",
        "runtime": f"As of 'mp2 bbt'.  {_HERE}",
        "precision": f"As of 'mp2 bbt'.  {_HERE}",
        "device": f"As of 'mp2 bbt'.  {_HERE}",
    },
)
def predict(run_dir: str, source: str, **typed: str | None) -> None:
    """Label new text with a tuned prompt; a JSON line each, with its probability."""
    from mp2.runs.predict import predict_file

    for found in predict_file(Path(run_dir), source, sys.stdin.buffer, **typed, note=note):
        click.echo(json.dumps(found, ensure_ascii=False))

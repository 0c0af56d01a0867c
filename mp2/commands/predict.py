"""``mp2 predict``: label new text with a tuned prompt."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import click

from mp2.commands.options import config_options, field_option
from mp2.commands.paths import PATH
from mp2.commands.printing import as_json_line, note
from mp2.errors import UsageError
from mp2.runs.config import BbtConfig

_HERE = "[default: the run's, if it is here]"


@click.command(short_help="Label new text with a tuned prompt.")
@click.option("--run", "run_dir", type=PATH, required=True, help="Folder of a finished 'mp2 bbt' run.")
@click.option(
    "--input",
    "source",
    required=True,
    type=PATH,
    metavar="FILE|-",
    help="JSON lines, plain text lines, CSV, TSV, parquet.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="COLUMN",
    help="Copy this of each line beside its label, as an id; again for more.",
)
@field_option
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
def predict(run_dir: str, source: str, keep: tuple[str, ...], **typed: Any) -> None:
    """Label new text with a tuned prompt: a JSON line for each line, with its probability; CSV for CSV."""
    from mp2.runs.predict import predict_file
    from mp2.tasks.record_files import TABLES, csv_separator, ending, has_mark

    if source == "-" and sys.stdin is None:
        raise UsageError("--input is - and standard input is closed; give a file, or lines on standard input")
    stdin = [] if sys.stdin is None else sys.stdin.buffer
    rows = predict_file(Path(run_dir), source, stdin, keep, **typed, note=note)
    if ending(Path(source)) not in TABLES:
        for found in rows:
            click.echo(as_json_line(found))
        return
    if (out := sys.stdout) is None:  # closed
        return
    writer = None
    for found in rows:
        row = {"reason": None, **found}
        if writer is None:
            columns = [*(name for name in row if name != "reason"), "reason"]
            separator = csv_separator(Path(source)) if ending(Path(source)) == ".csv" else ","
            if has_mark(Path(source)):  # without it a spreadsheet takes UTF-8 for something else
                out.write("\ufeff")
            writer = csv.DictWriter(out, columns, delimiter=separator, lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    out.flush()  # a full disk is noticed here, not at exit

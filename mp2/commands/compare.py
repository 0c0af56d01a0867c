"""``mp2 compare``: several runs in one table and one picture."""

from __future__ import annotations

from pathlib import Path

import click

from mp2.commands.paths import PathName
from mp2.commands.printing import as_json_text, note, show
from mp2.errors import UsageError


@click.command(short_help="Compare runs: one table, one picture.")
@click.argument("runs", nargs=-1, required=True, type=PathName(as_path=True))
@click.option(
    "--picture",
    type=PathName(as_path=True),
    default="compare.png",
    show_default=True,
    help="Where the curves of all runs are drawn.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the runs' results as a JSON list.")
def compare(runs: tuple[Path, ...], picture: Path, as_json: bool) -> None:
    """Show runs (folders, or folders of them) side by side: baselines, untuned, tuned; draw their curves."""
    from mp2.commands.report import show_series
    from mp2.runs.compare import draw, read_runs

    results, open_dirs = read_runs(runs)
    if not picture.parent.is_dir():
        raise UsageError(f"--picture {picture}: there is no folder {picture.parent}")
    if as_json:
        click.echo(as_json_text(results))
    elif results:
        show_series(results)
    for run_dir in open_dirs:
        note(f"mp2: {run_dir} has not ended: it is drawn as far as it came")
    draw(picture, results, open_dirs)
    if not as_json:
        show(f"curves: {picture}")

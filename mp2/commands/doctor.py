"""``mp2 doctor``: what this machine has."""

from __future__ import annotations

import click

from mp2.commands.printing import as_json_text, show_table


@click.command(short_help="Show what this machine has.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Show what this machine has: libraries, runtimes, devices, embedded weights, data."""
    from mp2.doctor import examine, rows

    found = examine()
    if as_json:
        click.echo(as_json_text(found))
    else:
        show_table(rows(found))

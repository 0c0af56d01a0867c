"""The command line: every command parses, calls one function and prints; no logic lives here.

Exit status: 0 done, 1 the work failed, 2 the command was typed wrong or its input is bad.
Results go to stdout (``--json`` for machines), progress and log to stderr.
"""

from __future__ import annotations

import json
import sys

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


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)

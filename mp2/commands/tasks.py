"""``mp2 tasks``: what there is, and whether a card and its data are good."""

from __future__ import annotations

import sys

import click

from mp2.commands.printing import as_json_text


@click.group(invoke_without_command=True, short_help="List, show and check tasks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def tasks(ctx: click.Context, as_json: bool) -> None:
    """List the tasks; 'show' one, 'check' your own."""
    if ctx.invoked_subcommand is None:
        from mp2.tasks.show import task_rows, task_table

        click.echo(as_json_text(task_rows()) if as_json else task_table())


@tasks.command("show")
@click.argument("name")
@click.option("--backbone", help="Count tokens with this backbone's tokenizer.  [default: mini]")
@click.option("--data", type=click.Path(), help="Folder with NAME/train.jsonl; or MP2_DATA.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tasks_show(name: str, backbone: str | None, data: str | None, as_json: bool) -> None:
    """Show a task card (a name or a TOML file), an example written out, and token lengths."""
    from mp2.tasks.show import view_task

    view = view_task(name, data, backbone)
    click.echo(as_json_text(view.as_dict()) if as_json else str(view))


@tasks.command("check")
@click.argument("card")
@click.option("--data", type=click.Path(), help="Folder with <task>/{train,dev,test}.jsonl; or MP2_DATA.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tasks_check(card: str, data: str | None, as_json: bool) -> None:
    """Check a card (a TOML file or a name) and its data; report every problem, exit 2 if there are any."""
    from mp2.tasks.check import check_task

    report = check_task(card, data)
    click.echo(as_json_text(report.as_dict()) if as_json else str(report))
    sys.exit(0 if report.ok else 2)

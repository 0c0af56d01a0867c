"""``mp2 tasks``: what there is, and whether a card and its data are good."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

import click

from mp2.commands.options import TASK, build, config_options
from mp2.commands.paths import PathName
from mp2.commands.printing import as_json_text, note, show, show_table, tell
from mp2.errors import UsageError
from mp2.runs.config import BbtConfig

_CHECKED = (  # of a run's options, those that say what it reads, and how
    *("data", "field", "shots", "dev", "test"),
    *("backbone", "revision", "prompts", "kind", "head", "max_tokens"),
)


@click.group(invoke_without_command=True, short_help="List, show and check tasks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def tasks(ctx: click.Context, as_json: bool) -> None:
    """List the tasks; 'show' one, 'check' your own."""
    if ctx.invoked_subcommand is None:
        from mp2.tasks.show import task_rows

        rows = task_rows()
        if as_json:
            click.echo(as_json_text(rows))
            return
        cells = [["-" if value is None else str(value) for value in row.values()] for row in rows]
        show_table(cells, tuple(rows[0]))
        show(f"{len(rows)} tasks; 'mp2 tasks show NAME' shows one")


@tasks.command("show")
@click.argument("name", type=TASK)
@config_options(
    BbtConfig,
    only={
        "backbone": "Count tokens with this backbone's tokenizer.  [default: mini]",
        "revision": "Of a hub backbone: a branch, tag or commit.",
        "data": "Folder with NAME/train.jsonl; or MP2_DATA.",
    },
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tasks_show(name: str, as_json: bool, **typed: Any) -> None:
    """Show a task card (a name or a TOML file), an example written out, and token lengths."""
    from mp2.tasks.show import view_task

    view = view_task(name, **typed)
    if as_json:
        click.echo(as_json_text(view.as_dict()))
    else:
        show_table(view.rows())


@tasks.command("check")
@click.argument("card", type=TASK)
@config_options(BbtConfig, keep=_CHECKED)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tasks_check(card: str, as_json: bool, **typed: Any) -> None:
    """Check a card (a TOML file or a name) and its data as 'mp2 bbt' does; exit 2 for what it refuses.

    The options are those of 'mp2 bbt': give the ones that the run will have.
    """
    from mp2.runs.task_check import check_as_run

    report = check_as_run(build(BbtConfig, typed, task=card))
    if as_json:
        click.echo(as_json_text(report.as_dict()))
    else:
        tell(str(report))
    sys.exit(0 if report.ok else 2)


@tasks.command("new")
@click.argument("file", type=PathName(as_path=True))
@click.option("--name", help="The task's name.  [default: from the file's name]")
@click.option("--out", type=PathName(as_path=True), help="The card.  [default: NAME.toml here]")
def tasks_new(file: Path, name: str | None, out: Path | None) -> None:
    """Write a task card, to be edited, from a data file (JSON lines, CSV, TSV, parquet), its folder or a set.

    A set is a folder that the library datasets saved, or hub:NAME.
    """
    from mp2.files import write_text
    from mp2.tasks import has_split, load_card
    from mp2.tasks.new_card import new_card, test_file_beside, training_file

    made = new_card(training_file(file), name)
    path = out or Path(f"{made.task}.toml")
    if path.exists():
        raise UsageError(f"{path} is there already; give another --out")
    write_text(path, made.text)
    tell("\n".join([*made.found, f"wrote {path}; edit it, then:"]))
    words = ["--data", quote(str(file))]
    if not has_split(load_card(path), "test", file):
        words.append("--no-test")
        if unread := test_file_beside(file):
            tell(f"{unread} is not read with {file.name}: call that train{unread.suffix} to have it scored")
    tell(" ".join(["  mp2 tasks check", quote(str(path)), *words]))
    tell(" ".join(["  mp2 bbt --task", quote(str(path)), *words]))


@tasks.command("fetch")
@click.argument("names", nargs=-1, required=True)
@click.option("--to", type=PathName(as_path=True), required=True, help="Data folder; --data DIR reads it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tasks_fetch(names: tuple[str, ...], to: Path, as_json: bool) -> None:
    """Load the public data of tasks (names, cards or 'all'); what is there already stays.

    Exit status 1 if one of several could not be loaded, and why; the others are.
    """
    from mp2.tasks.fetch import fetch_all

    fetched, failed = fetch_all(names, to, note)
    if as_json:
        click.echo(as_json_text([asdict(one) for one in fetched]))
    else:
        tell("\n".join([*map(str, fetched), f"{len(fetched)} tasks in {to}: --data {to} reads them"]))
    sys.exit(1 if failed else 0)


@tasks.command("sources")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tasks_sources(as_json: bool) -> None:
    """List where every card's data come from: source, format, licence, whether it was confirmed."""
    from mp2.tasks.show import source_rows, sources_page

    click.echo(as_json_text(source_rows()) if as_json else sources_page().rstrip())

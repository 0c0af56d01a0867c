"""What commands print with: results on stdout, notes on stderr, tables that fit the terminal."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import click

from mp2.messages import printable, shortened, warnings_are_lines

_UNLIMITED = 10_000  # columns: of a file or a pipe

if TYPE_CHECKING:
    from rich.console import RenderableType


def note(line: str) -> None:
    """Print a line of progress or log."""
    click.echo(shortened(line), err=True)


def tell(text: str) -> None:
    """Print a result for people; JSON and tables for programs, which are not shortened, go past this."""
    click.echo(shortened(text))


def prepare_streams() -> None:
    """What a locale cannot spell is printed as an escape; no file takes a closed stream's number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings_are_lines()


def notes(quiet: bool) -> Callable[[str], None]:
    """``note``, or with ``--quiet`` nothing."""
    return (lambda line: None) if quiet else note


quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress and no notes on stderr.")


def show(what: RenderableType) -> None:
    """Print a result: within the terminal's width, in whole lines where there is none."""
    from rich.console import Console

    if sys.stdout is None:  # closed
        return
    width = None if sys.stdout.isatty() else _UNLIMITED
    console = Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(shortened(what) if isinstance(what, str) else what, soft_wrap=isinstance(what, str))
    text = "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))
    (tell if width else click.echo)(text)  # a terminal's lines are no longer than it is wide


def show_table(
    rows: Iterable[Sequence[str]], head: Sequence[str] = (), numbers_from: int | None = None
) -> None:
    """Print rows in columns, numbers from one on; long cells fold, wide characters count double."""
    from rich.table import Table

    rows = list(rows)
    table = Table(box=None, show_header=bool(head), pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i in range(max(map(len, [head, *rows]))):
        numeric = numbers_from is not None and i >= numbers_from
        table.add_column(head[i] if head else "", overflow="fold", justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*map(printable, row))
    show(table)


def as_json_text(value: object) -> str:
    """A result for machines to read, and people too: in ASCII where stdout is not UTF-8."""
    return json.dumps(value, ensure_ascii=not _is_utf8(), indent=2)


def as_json_line(value: object) -> str:
    """A result of many, on one line; see ``as_json_text``."""
    return json.dumps(value, ensure_ascii=not _is_utf8())


def _is_utf8() -> bool:
    name = getattr(sys.stdout, "encoding", None) or "utf-8"
    return name.lower().replace("_", "-") in ("utf-8", "utf8")


def given(ctx: click.Context) -> set[str]:
    """Names of the options that stand on the command line."""
    source = click.core.ParameterSource.COMMANDLINE
    names = {parameter.name for parameter in ctx.command.params if parameter.name}
    return {name for name in names if ctx.get_parameter_source(name) is source}


def typed() -> str:
    """What was typed, for people to read and to type again."""
    return shlex.join(["mp2", *sys.argv[1:]])

"""What commands print with: results on stdout, notes on stderr, tables that fit the terminal."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import click

from mp2.messages import printable, shortened, warnings_are_lines

_UNLIMITED = 10_000  # columns: of a file or a pipe

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


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


def _console() -> Console:
    """Standard output: within the terminal's width, in whole lines where there is none."""
    from rich.console import Console

    # asked here, and with a height: for TERM=dumb rich takes 80 columns
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED
    return Console(file=sys.stdout, width=width, height=25, markup=False, emoji=False, highlight=False)


def show(what: RenderableType) -> None:
    """Print a result."""
    if sys.stdout is None:  # closed
        return
    console = _console()
    with console.capture() as captured:
        console.print(shortened(what) if isinstance(what, str) else what, soft_wrap=isinstance(what, str))
    text = "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))
    (click.echo if sys.stdout.isatty() else tell)(text)  # a terminal's lines are no longer than it is wide


def show_table(
    rows: Iterable[Sequence[str]], head: Sequence[str] = (), numbers_from: int | None = None
) -> None:
    """Print rows in columns, numbers from one on; long cells fold, wide characters count double.

    Where the terminal has no room for whole words and numbers side by side, each row is a paragraph: a line a
    column with its head.
    """
    from rich.cells import cell_len
    from rich.table import Table

    if sys.stdout is None:
        return
    rows = [[printable(cell) for cell in row] for row in rows]
    columns = list(zip_longest(head, *rows, fillvalue=""))
    least = [max(map(_longest_word, column)) for column in columns]
    spare = _console().width - sum(least) - 2 * len(columns)
    if head and spare < 0:
        for i, row in enumerate(rows):
            show_table(([("", "")] if i else []) + list(zip(head, row, strict=False)))
        return
    table = Table(box=None, show_header=bool(head), pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        more = min(max(map(cell_len, column)) - least[i], spare)  # the first columns get what they need
        spare -= more
        table.add_column(
            column[0] if head else "",
            overflow="fold",
            justify="right" if numbers_from is not None and i >= numbers_from else "left",
            width=least[i] + more if head else None,
        )
    for row in rows:
        table.add_row(*row)
    show(table)


def _longest_word(text: str) -> int:
    """Columns that a cell needs so that no word of it is broken; a wide character is a word of its own."""
    from rich.cells import cell_len

    words = (word for word in text.split())
    return max((2 if cell_len(word) > len(word) else len(word) for word in words), default=0)


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

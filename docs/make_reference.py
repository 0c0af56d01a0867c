"""Write docs/reference.md, every command with its arguments and options, from the commands themselves.

python docs/make_reference.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from mp2.cli import main as mp2

PAGE = Path(__file__).with_name("reference.md")
HEAD = """# Reference of the commands

Written by `python docs/make_reference.py` from the commands themselves: do not edit. `mp2 COMMAND --help`
prints the same. `python -m mp2` is the same command as `mp2`.

Exit status of every command: 0 done, 1 the work failed, 2 a wrong command or bad input, 130 stopped by
Ctrl-C.
Results go to stdout (`--json`: for machines), progress and messages to stderr.
"""


def commands(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    """Every command under ``group``, in the order of its help, with its whole name."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{prefix} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix} {name}")


def section(name: str, command: click.Command) -> str:
    """A command's heading, usage, text and table of parameters."""
    context = click.Context(command, info_name=name)
    parts = [f"## {name}", f"```\n{name} {' '.join(command.collect_usage_pieces(context)).strip()}\n```"]
    text = inspect.cleandoc(command.help or "").replace("\b\n", "")
    parts.append(re.sub(r"\f.*", "", text, flags=re.DOTALL).strip())
    rows = [row(parameter, context) for parameter in command.get_params(context)]
    shown = [r for r in rows if r]
    if shown:
        parts.append("\n".join(["| option | what | default |", "| --- | --- | --- |", *shown]))
    return "\n\n".join(parts) + "\n"


def row(parameter: click.Parameter, context: click.Context) -> str:
    """An option's line of the table; empty for arguments, ``--help`` and what is hidden."""
    if not isinstance(parameter, click.Option) or parameter.hidden or "--help" in parameter.opts:
        return ""
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if not parameter.is_flag:
        names += f" `{parameter.make_metavar(context)}`".replace("|", "\\|")
    default = parameter.get_default(context)
    plain = isinstance(default, (str, int, float)) and not isinstance(default, bool)
    what = re.sub(r"\s+", " ", parameter.help or "").strip().replace("|", "\\|")
    return f"| {names} | {what} | {default if plain and parameter.show_default is not False else ''} |"


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(section(*found) for found in commands(mp2, "mp2"))])


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(PAGE.name)

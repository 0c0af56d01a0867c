"""What commands share: notes on stderr, JSON, and what was typed."""

from __future__ import annotations

import json
import shlex
import sys

import click


def note(line: str) -> None:
    """Print a line of progress or log."""
    click.echo(line, err=True)


def as_json_text(value: object) -> str:
    """A result for machines to read, and people too."""
    return json.dumps(value, ensure_ascii=False, indent=2)


def given(ctx: click.Context) -> set[str]:
    """Names of the options that stand on the command line."""
    source = click.core.ParameterSource.COMMANDLINE
    names = {parameter.name for parameter in ctx.command.params if parameter.name}
    return {name for name in names if ctx.get_parameter_source(name) is source}


def typed() -> str:
    """What was typed, for people to read and to type again."""
    return shlex.join(["mp2", *sys.argv[1:]])

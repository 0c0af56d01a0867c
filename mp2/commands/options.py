"""Options that more than one command has, and one choice by two flags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from mp2.errors import UsageError


def _choose(ctx: click.Context, parameter: click.Parameter, typed: bool) -> None:
    """Set the command's ``kind`` to the flag's name; None where neither flag was typed."""
    before = ctx.params.setdefault("kind", None)
    if typed and before not in (None, parameter.name):
        raise UsageError("--deep and --shallow were both given: drop one of them")
    if typed:
        ctx.params["kind"] = parameter.name


_KIND = (
    click.option(
        "--deep",
        is_flag=True,
        expose_value=False,
        callback=_choose,
        help="Prompts at every layer.  [default]",
    ),
    click.option(
        "--shallow", is_flag=True, expose_value=False, callback=_choose, help="Prompts at the input only."
    ),
)

_TUNED_MODEL = (
    click.option("--data", type=click.Path(), help="Folder with TASK/{train,test}.jsonl; or MP2_DATA."),
    click.option(
        "--backbone", default="mini", show_default=True, help="mini, cpt-large, a folder, or a hub id."
    ),
    click.option(
        "--prompts", help="Modular prompts: a file, mini-deep or mini-shallow.  [default: the backbone's]"
    ),
    *_KIND,
)


def tuned_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say on which data, backbone and prompts a task is tuned."""
    return _with(_TUNED_MODEL, command)


def prompt_kind(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--deep`` and ``--shallow``: the command's ``kind``, None where neither was typed."""
    return _with(_KIND, command)


def _with(options: Sequence[Callable[..., Any]], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command

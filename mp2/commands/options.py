"""Options that more than one command has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_TUNED_MODEL = (
    click.option("--data", type=click.Path(), help="Folder with TASK/{train,test}.jsonl; or MP2_DATA."),
    click.option(
        "--backbone", default="mini", show_default=True, help="mini, cpt-large, a folder, or a hub id."
    ),
    click.option(
        "--prompts", help="Modular prompts: a file, mini-deep or mini-shallow.  [default: the backbone's]"
    ),
    click.option("--deep", "kind", flag_value="deep", help="Prompts at every layer.  [default]"),
    click.option("--shallow", "kind", flag_value="shallow", help="Prompts at the input only."),
)


def tuned_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say on which data, backbone and prompts a task is tuned."""
    for option in reversed(_TUNED_MODEL):
        command = option(command)
    return command

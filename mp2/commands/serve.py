"""``mp2 serve``: answer tasks over HTTP."""

from __future__ import annotations

from typing import Any

import click

from mp2.commands.options import build, config_options
from mp2.commands.printing import note
from mp2.errors import MissingDependencyError
from mp2.serve.config import ServeConfig


@click.command(short_help="Answer the tasks of a bundle over HTTP.")
@config_options(ServeConfig)
def serve(**typed: Any) -> None:
    """Answer the tasks of a bundle over HTTP: text in, label and probability out; tensors for programs."""
    config = build(ServeConfig, typed)
    try:
        from mp2.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"mp2 serve needs {error.name}: pip install 'mp2[serve]'") from None
    run(config, lambda line: note(f"mp2: {line}"))

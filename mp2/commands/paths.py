"""Paths on the command line: ``~`` is the home folder, and what can be no path is said at once.

A shell leaves ``~`` alone in ``--data=~/x``, and in a program's arguments.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mp2.errors import UsageError, shown

_LONGEST_NAME = 255  # bytes, of nearly all file systems


def checked_path(text: str, what: str) -> str:
    """``text`` with ``~`` written out; ``what`` names the option in errors.

    Raises:
        UsageError: it is too long for a path.
    """
    path = os.path.expanduser(text)
    data = os.fsencode(path)
    too_long = any(len(part) > _LONGEST_NAME for part in data.split(b"/"))
    try:
        os.lstat(path)
    except OSError as error:
        too_long = too_long or error.errno == errno.ENAMETOOLONG
    except ValueError as error:
        raise UsageError(f"{what}: {shown(text)} has a zero byte: that is no path") from error
    if too_long:
        raise UsageError(
            f"{what}: {shown(text)} has {len(data):,} bytes, too long for a path; expected a file or a folder"
        )
    return path


def option_name(param: click.Parameter | None) -> str:
    """What an option or argument is called in errors."""
    if param is None:
        return "path"
    return param.opts[0] if isinstance(param, click.Option) else str(param.name).upper()


class PathName(click.ParamType[Any]):
    """A path, as text or as a ``Path``."""

    name = "path"

    def __init__(self, *, as_path: bool = False) -> None:
        self._as_path = as_path

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path with ``~`` written out; raises ``UsageError``."""
        if value == "":
            raise UsageError(f"{option_name(param)} is empty, expected a path")
        path = checked_path(str(value), option_name(param))
        return Path(path) if self._as_path else path

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Files and folders."""
        return [CompletionItem(incomplete, type="file")]


PATH = PathName()

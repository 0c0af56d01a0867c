"""A setting, its default, its help, its choices and its limits: said once, where the config declares it.

    popsize: int = option(20, "Population of CMA-ES.", at_least=3)

A frozen dataclass that calls :func:`check` in its ``__post_init__`` refuses what is outside of these, whoever
makes it; ``mp2.commands.options`` makes the command line's options of the same fields. Fields without
``option`` are for Python only.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from mp2.errors import UnknownNameError, UsageError


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a field's metadata hold under ``option``."""

    help: str
    flag: str | None = None  # its name on the command line and in messages; None: the field's
    kind: str = "value"  # or path, task, backbone, prompts, device, router search
    choices: tuple[str, ...] = ()
    what: str | None = None  # of a choice: "unknown <what> 'x'"; None: the field's name
    default_text: str | None = None  # where the default is None
    metavar: str | None = None
    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf  # exclusive, and so never infinite
    below: float = math.inf  # exclusive
    expected: str | None = None  # in words; None: at least, at most
    why: str = ""  # is put after the limit


def option(default: Any = MISSING, help: str = "", **settings: Any) -> Any:
    """A dataclass field that is an option, too; ``settings`` as of :class:`Option`."""
    return field(default=default, metadata={"option": Option(help=help, **settings)})


def check(config: Any) -> None:
    """Raise ``UsageError`` for the first field that is outside of its limits or none of its choices."""
    for item in fields(config):
        found: Option | None = item.metadata.get("option")
        value = getattr(config, item.name)
        if found is None or value is None:
            continue
        name = (found.flag or item.name).replace("-", "_")
        if found.choices and value not in found.choices:
            raise UnknownNameError(found.what or name.replace("_", " "), str(value), found.choices)
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(found, name, value)


def _check_number(found: Option, name: str, value: float) -> None:
    if found.at_least <= value <= found.at_most and found.above < value < found.below:
        return
    if found.expected is not None:
        raise UsageError(f"{name} is {value}, expected {found.expected}")
    limit = f"at least {found.at_least:,}" if value < found.at_least else f"at most {found.at_most:,}"
    raise UsageError(f"{name} is {value}, expected {limit}{found.why}")

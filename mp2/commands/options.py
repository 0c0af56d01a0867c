"""Options of the command line from the fields of a config, and a config from what was typed.

A field that carries :func:`mp2.options.option` becomes ``--its-name``; a config inside a config adds its own.
What was not typed has the field's default. Shells complete the names of tasks, backbones, prompts, runtimes,
precisions and searches (``mp2 --help`` says how to switch that on).
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any, Union, get_args, get_origin, get_type_hints

import click
from click.shell_completion import CompletionItem

from mp2.commands.paths import PATH, checked_path, option_name
from mp2.errors import UnknownNameError, UsageError
from mp2.options import Option


class Choice(click.Choice[str]):
    """One of a closed set; another name is answered with the nearest ones."""

    def __init__(self, what: str, choices: tuple[str, ...]) -> None:
        super().__init__(choices)
        self._what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it is; raises ``UnknownNameError``."""
        if value not in self.choices:
            raise UnknownNameError(self._what, str(value), self.choices)
        return str(value)


class Name(click.ParamType[str]):
    """A name of an open set, a file or a folder too where ``paths``; only completed, looked up by others."""

    def __init__(self, name: str, known: Callable[[], list[str]], *, paths: bool = True) -> None:
        self.name, self._known, self._paths = "text", known, paths
        self.of = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name, or the path with ``~`` written out; raises ``UsageError`` for what can be neither."""
        text = str(value)
        if self._paths and (
            "/" in text or text.startswith("~") or self.of != "task" or text.endswith(".toml")
        ):
            return checked_path(text, option_name(param))
        return text

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The known names that begin so; files where none does."""
        found = [CompletionItem(name) for name in self._known() if name.startswith(incomplete)]
        return found or ([CompletionItem(incomplete, type="file")] if self._paths else [])


def _tasks() -> list[str]:
    from mp2.tasks.card import card_names

    return list(card_names())


def _backbones() -> list[str]:
    from mp2.backbone.load import EMBEDDED, HUB_NAMES

    return [*EMBEDDED, *HUB_NAMES]


def _prompts() -> list[str]:
    from mp2.prompts.prompt_set import EMBEDDED

    return list(EMBEDDED)


def _searches() -> list[str]:
    from mp2.optimizers.router_search import METHODS

    return [method.replace("<optimizer>", "") for method in METHODS]


TASK = Name("task", _tasks)
BACKBONE = Name("backbone", _backbones)
PROMPTS = Name("prompts", _prompts)
DEVICE = Name("device", lambda: ["cpu", "cuda"], paths=False)
_TYPES: dict[str, click.ParamType[Any]] = {
    "path": PATH,
    "task": TASK,
    "backbone": BACKBONE,
    "prompts": PROMPTS,
    "device": Name("device", lambda: ["auto", "cpu", "cuda"], paths=False),
    "router search": Name("router search", _searches, paths=False),
}


def named_tasks(given: Sequence[str]) -> list[str]:
    """The tasks of options or arguments, each a name, a card or several with commas.

    Raises:
        UsageError: a task given twice.
    """
    tasks: list[str] = []
    for text in given:
        tasks += [text] if os.path.exists(text) else [part.strip() for part in text.split(",")]
    twice = [task for task in tasks if tasks.count(task) > 1]
    if twice:
        raise UsageError(f"task '{twice[0]}' was given twice; give each task once")
    return tasks


def config_options(
    config: type[Any],
    *,
    skip: Collection[str] = (),
    keep: Collection[str] | None = None,
    only: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of a config's fields to a command.

    Args:
        config: the dataclass.
        skip: fields, or command-line names, for which this command has no option, or one of its own.
        keep: the only fields that it has, if given.
        only: help by field, of a command that has no others, and no defaults.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for item, found, hint in reversed(list(_fields(config))):
            if keep is not None and item.name not in keep:
                continue
            if only is not None and item.name in only:
                found = replace(found, help=only[item.name], default_text=None)
                command = _click_option(item.name, found, None, hint)(command)
            elif only is None and not {item.name, parameter(item.name, found)} & {*skip}:
                command = _click_option(item.name, found, item.default, hint)(command)
        return command

    return add


def build(config: type[Any], typed: Mapping[str, Any], **values: Any) -> Any:
    """The config of what was typed; ``values`` are fields that it has from elsewhere."""
    hints = get_type_hints(config)
    for item in fields(config):
        if is_dataclass(hints[item.name]) and item.name not in values:
            values[item.name] = build(hints[item.name], typed)  # type: ignore[arg-type]
    return config(**{**field_values(config, typed), **values})


def field_values(config: type[Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Values by field of what was typed, without those of configs inside the config."""
    values: dict[str, Any] = {}
    for item in fields(config):
        found: Option | None = item.metadata.get("option")
        if found is None or (name := parameter(item.name, found)) not in typed:
            continue
        if name == "kind" and typed[name] == "auto" and "auto" not in found.choices:
            continue  # neither --deep nor --shallow
        values[item.name] = not typed[name] if name == f"no_{item.name}" else typed[name]
    return values


def parameter(field: str, found: Option) -> str:
    """The name of a field's option in what was typed."""
    return (found.flag or field).replace("-", "_")


def _fields(config: type[Any]) -> Iterator[tuple[Field[Any], Option, Any]]:
    hints = get_type_hints(config)
    own = {
        parameter(item.name, item.metadata["option"]) for item in fields(config) if "option" in item.metadata
    }
    for item in fields(config):
        if is_dataclass(hints[item.name]):
            inner = _fields(hints[item.name])  # type: ignore[arg-type]
            yield from (x for x in inner if parameter(x[0].name, x[1]) not in own)  # which hides it
        elif "option" in item.metadata:
            yield item, item.metadata["option"], hints[item.name]


def _click_option(field: str, found: Option, default: Any, hint: Any) -> Callable[..., Any]:
    name = parameter(field, found)
    if field == "kind":
        return _kind_flags
    if found.kind == "field":
        return field_option
    settings: dict[str, Any] = {"help": found.help}
    flag = f"--{name.replace('_', '-')}"
    if hint is bool:
        return click.option(flag, name, is_flag=True, **settings)
    if found.choices:
        settings["type"] = Choice(found.what or name.replace("_", " "), found.choices)
    elif found.kind in _TYPES:
        settings["type"] = _TYPES[found.kind]
    else:
        settings["type"] = _plain(hint)
    if found.metavar:
        settings["metavar"] = found.metavar
    if default is MISSING:
        settings["required"] = True
    elif default is not None:
        settings |= {"default": default, "show_default": True}
    elif found.default_text:
        settings["help"] = f"{found.help}  [default: {found.default_text}]"
    return click.option(flag, name, **settings)


def _plain(hint: Any) -> Any:
    """``int`` of ``int | None``."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def _choose(ctx: click.Context, parameter: click.Parameter, typed: bool) -> None:
    """Set the command's ``kind`` to the flag's name; ``auto`` where neither flag was typed."""
    before = ctx.params.setdefault("kind", "auto")
    if typed and before not in ("auto", parameter.name):
        raise UsageError("--deep and --shallow were both given: drop one of them")
    if typed:
        ctx.params["kind"] = parameter.name


def _kind_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--deep`` and ``--shallow``: one choice by two flags."""
    settings: dict[str, Any] = {"is_flag": True, "expose_value": False, "callback": _choose}
    command = click.option("--shallow", **settings, help="Prompts at the input only.")(command)
    return click.option("--deep", **settings, help="Prompts at every layer.  [default]")(command)


field_option = click.option(
    "--field",
    multiple=True,
    metavar="KEY=NAME",
    help="The data's name for a key of the card; again for more.",
)


def _logger_names(ctx: click.Context, parameter: click.Parameter, typed: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(name.strip() for text in typed for name in text.split(",")))


log_option = click.option(
    "--log",
    "loggers",
    multiple=True,
    metavar="NAME",
    callback=_logger_names,
    help="Also log to tensorboard, mlflow or wandb (offline unless told otherwise); again for more.",
)


def read_seeds(one: int | None, several: str | None) -> list[int]:
    """The seeds of ``--seed`` or ``--seeds``; raises ``UsageError`` for both, or for what are no seeds."""
    if several is None:
        return [8 if one is None else one]
    if one is not None:
        raise UsageError("--seed and --seeds were both given; give one of them")
    try:
        seeds = [int(part) for part in several.split(",")]
    except ValueError:
        raise UsageError(
            f"--seeds is '{several}', expected whole numbers with commas: 8,13,21,42,100"
        ) from None
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds is '{several}', expected different numbers of 0 or more")
    return seeds

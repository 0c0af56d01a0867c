"""JSON that somebody gave us: the one reader, and fields compared with what should be there.

``parse_json`` refuses what Python's reader takes or dies of: keys that stand twice, NaN and Infinity, numbers
beyond a float's range or of hundreds of digits, nesting of more than `MAX_DEPTH`. A *rule* says what a value
must be; ``check`` names the first field that breaks it. ``build`` makes a dataclass, whose annotations are
the rules:

    check(values, Fields({"step": whole(), "loss": null_or(number())}), path)
    config = build(PretrainConfig, values, path)
"""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mp2.errors import FormatError, UsageError, shown
from mp2.text_files import read_text

MAX_DEPTH = 64  # of lists and objects in each other; nothing that we know has 10
MAX_DIGITS = 1000  # a float has at most 309 before its point
MAX_BYTES = 32 * 2**20  # vocabularies apart, no JSON file that is published for a model has 3 MB
T = TypeVar("T")


class JsonError(ValueError):
    """A text is no JSON, or JSON that mp2 does not read; line and column from 1, where they are known."""

    def __init__(self, message: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.line, self.column = line, column


def parse_json(text: str) -> Any:
    """The value that ``text`` spells.

    Raises:
        JsonError: see the head of this module.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON: {error.msg}", error.lineno, error.colno) from error
    except RecursionError as error:
        raise JsonError(_DEEP) from error
    _check_depth(value)
    return value


_DEEP = f"not JSON that can be read: nested too deeply, expected at most {MAX_DEPTH} levels"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"key {shown(twice)} stands twice in one object")
    return made


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise JsonError(
            f"not JSON that can be read: a number has too many digits ({len(text):,}), expected at most "
            f"{MAX_DIGITS}"
        )
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonError(f"number {shown(text)} is beyond what a float holds")
    return value


def _constant(text: str) -> Any:
    raise JsonError(f"has {text}, which is no number of JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_int, parse_float=_float, parse_constant=_constant
)


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, list | dict)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise JsonError(_DEEP)
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]


def read_json(path: Path, expected: str = "a JSON file", *, max_bytes: int = MAX_BYTES) -> Any:
    """The JSON value in ``path``; raises ``FormatError`` for what cannot be read."""
    return parse_file(read_text(path, expected, max_bytes=max_bytes), path)


def parse_file(text: str, path: Path, field: str | None = None) -> Any:
    """The JSON value that ``text`` is: the content of ``path``, or of ``field`` in it."""
    try:
        return parse_json(text)
    except JsonError as error:
        at = f" at line {error.line}, column {error.column}" if error.line else ""
        raise FormatError(f"{error}{at}", path=path, field=field) from error


def read_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        FormatError: no such file, not JSON, not an object.
    """
    return parse_object(read_text(path, "a JSON object", max_bytes=max_bytes), path)


def parse_object(text: str, path: Path, field: str | None = None) -> dict[str, Any]:
    """The JSON object that ``text`` is; errors as of ``read_object``."""
    raw = parse_file(text, path, field)
    if not isinstance(raw, dict):
        raise FormatError(f"is a JSON {type(raw).__name__}, expected an object", path=path, field=field)
    return raw


class WrongValue(Exception):
    """What a rule raises: the field (``a.b``, "" for the whole) and what is wrong with it."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where = where


Rule = Callable[[Any, str], Any]
"""Takes a value and where it stands; raises ``WrongValue``, or returns what the value is read as."""


def check(value: Any, rule: Rule, path: Path | str, *, line: int | None = None, where: str = "") -> Any:
    """The value by its rule; raises ``FormatError`` with file and field."""
    try:
        return rule(value, where)
    except WrongValue as error:
        raise FormatError(str(error), path=path, line=line, field=error.where or None) from None


def _plain(is_right: Callable[[Any], bool], expected: str) -> Rule:
    def rule(value: Any, where: str) -> Any:
        if not is_right(value):
            raise WrongValue(where, f"is {shown(value)}, expected {expected}")
        return value

    return rule


def _is_number(value: Any) -> bool:
    finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max  # NaN is not
    return finite and not isinstance(value, bool)


def whole(at_least: int = 0, at_most: int = 2**63 - 1) -> Rule:
    """A whole number; negative ones only where ``at_least`` says so."""
    most = "" if at_most == 2**63 - 1 else f" to {at_most:,}"
    expected = f"a whole number, {at_least:,}{most or ' or more'}"
    return _plain(lambda v: _is_number(v) and isinstance(v, int) and at_least <= v <= at_most, expected)


def number(at_least: float = -math.inf, at_most: float = math.inf) -> Rule:
    """A finite number."""
    expected = "a number"
    if at_least > -math.inf:
        expected += f", {at_least:g}" + (f" to {at_most:g}" if at_most < math.inf else " or more")
    return _plain(lambda v: _is_number(v) and at_least <= v <= at_most, expected)


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode("utf-8", "surrogateescape")  # those that stand for bytes of a path that is no UTF-8
    except UnicodeEncodeError:
        return False
    return True


text = _plain(_is_text, "a text")
one_line = _plain(
    lambda v: _is_text(v) and not any(c < " " for c in v) and len(v.splitlines()) < 2, "a text of one line"
)
boolean = _plain(lambda v: isinstance(v, bool), "true or false")
sha256 = _plain(
    lambda v: isinstance(v, str) and len(v) == 64 and not v.strip("0123456789abcdef"), "a SHA-256 in hex"
)
anything: Rule = lambda value, where: value  # noqa: E731 - the shortest rule
_object_of_any = _plain(lambda v: isinstance(v, dict), "an object")
_list_of_any = _plain(lambda v: isinstance(v, list), "a list")


def one_of(*values: Any) -> Rule:
    """One of a few values."""
    known = f"one of {', '.join(map(str, values))}" if values[1:] else repr(values[0])
    return _plain(lambda v: any(v == x and type(v) is type(x) for x in values), known)


def null_or(rule: Rule) -> Rule:
    """Null, or what ``rule`` says."""

    def checked(value: Any, where: str) -> Any:
        try:
            return None if value is None else rule(value, where)
        except WrongValue as error:
            more = " or null" if error.where == where else ""
            raise WrongValue(error.where, f"{error}{more}") from None

    return checked


def list_of(rule: Rule, n: int | None = None) -> Rule:
    """A list, of ``n`` values if that is given, each by ``rule``."""

    def checked(value: Any, where: str) -> list[Any]:
        _list_of_any(value, where)
        if n is not None and len(value) != n:
            raise WrongValue(where, f"has {len(value)} values, expected {n}")
        return [rule(inner, f"{where}[{i}]") for i, inner in enumerate(value)]

    return checked


def object_of(rule: Rule) -> Rule:
    """An object with any keys, each value by ``rule``."""

    def checked(value: Any, where: str) -> dict[str, Any]:
        _object_of_any(value, where)
        return {key: rule(inner, _below(where, key)) for key, inner in value.items()}

    return checked


def _below(where: str, key: str) -> str:
    return f"{where}.{key[:60]}".lstrip(".")


class Fields:
    """A rule: an object with these fields, those of ``needed`` at least; others are let be.

    As with every rule, the value is read as a copy that has been checked.
    """

    def __init__(self, needed: Mapping[str, Rule], maybe: Mapping[str, Rule] | None = None) -> None:
        self._needed, self._maybe = needed, maybe or {}

    def __call__(self, value: Any, where: str) -> dict[str, Any]:
        """Raise ``WrongValue``, or return a copy."""
        _object_of_any(value, where)
        for name in self._needed:
            if name not in value:
                raise WrongValue(_below(where, name), "missing")
        rules = {**self._maybe, **self._needed}
        return {
            name: rules[name](inner, _below(where, name)) if name in rules else inner
            for name, inner in value.items()
        }


def build(cls: type[T], values: Any, path: Path | str, *, where: str = "") -> T:
    """An instance of the dataclass ``cls``: its annotations are the rules, and what it refuses itself.

    Raises:
        FormatError: a field that is unknown, missing or not as annotated; the message names file and field.
    """
    try:
        made: T = check(values, dataclass_rule(cls), path, where=where)
    except FormatError as error:
        if str(error).startswith(f"{path}:"):
            raise
        raise FormatError(str(error), path=path) from error
    except UsageError as error:
        raise FormatError(str(error), path=path) from error
    return made


def dataclass_rule(cls: type[Any]) -> Rule:
    """The rule of an object that is read as the dataclass ``cls``."""
    hints = get_type_hints(cls)
    rules = {item.name: _rule_of(hints[item.name]) for item in fields(cls)}
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}

    def rule(value: Any, where: str) -> Any:
        _object_of_any(value, where)
        for name in value:
            if name not in rules:
                known = ", ".join(sorted(rules))
                raise WrongValue(_below(where, name), f"unknown field, expected one of {known}")
        for name in rules:
            if name in needed and name not in value:
                raise WrongValue(_below(where, name), "missing")
        return cls(**{name: rules[name](inner, _below(where, name)) for name, inner in value.items()})

    return rule


_PLAIN: dict[Any, Rule] = {
    bool: boolean,
    int: whole(-(2**63)),
    float: number(),
    str: text,
    Any: anything,
    dict: _object_of_any,
    list: _list_of_any,
}


def _rule_of(hint: Any) -> Rule:
    """The rule of an annotation."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, parts = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return dataclass_rule(hint)  # type: ignore[arg-type]
    if origin is Literal:
        return one_of(*parts)
    if origin in (Union, types.UnionType):
        (part,) = (part for part in parts if part is not type(None))  # T | None is all that configs have
        return null_or(_rule_of(part))
    if origin is tuple:
        inner = list_of(_rule_of(parts[0]), None if parts[1:] == (...,) else len(parts))
        return lambda value, where: tuple(inner(value, where))
    if origin is list:
        return list_of(_rule_of(parts[0]))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return object_of(_rule_of(parts[1]))
    raise TypeError(f"no rule for the annotation {hint}")

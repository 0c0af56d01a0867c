"""Lines of a task as clients send them: every value checked before a token is made of it."""

from __future__ import annotations

from typing import Any

from mp2.export.bundle_files.reading import Task
from mp2.serve.errors import BadRequestError
from mp2.serve.request_body import shown


def checked(task: Task, line: object, where: str = "") -> dict[str, Any]:
    """Return ``line`` if it is a line of ``task``, as `mp2 predict` takes it.

    BadRequestError names the field that is wrong; ``where`` stands before its name.
    """
    if not isinstance(line, dict):
        raise BadRequestError(f"{where}got {shown(line)}, expected an object with {', '.join(_keys(task))}")
    for key in _keys(task):
        if key not in line:
            raise BadRequestError(
                f"missing; task '{task['name']}' needs {', '.join(_keys(task))}", where + key
            )
    if unknown := [key for key in line if key not in _keys(task)]:
        raise BadRequestError(
            f"unknown; task '{task['name']}' has {', '.join(_keys(task))}", where + unknown[0][:60]
        )
    for name in task["fields"]:
        _check_text(line[name], where + name, _must_say_something(task, name))
    if task["type"] == "multiple_choice":
        _check_options(line["options"], where + "options")
    return line


def _keys(task: Task) -> list[str]:
    return [*task["fields"], *(["options"] if task["type"] == "multiple_choice" else [])]


def _must_say_something(task: Task, name: str) -> bool:
    return task["type"] == "classification" or (task["type"] == "extraction" and name == "context")


def _check_text(value: object, field: str, needed: bool) -> None:
    if not isinstance(value, str):
        raise BadRequestError(f"got {shown(value)}, expected a string", field)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRequestError("has half of a surrogate pair, which is no character", field) from None
    if needed and not value.strip():
        raise BadRequestError("empty; expected some text", field)


def _check_options(value: object, field: str) -> None:
    if not isinstance(value, list) or len(value) < 2:
        raise BadRequestError(f"got {shown(value)}, expected a list of at least 2 strings", field)
    for index, option in enumerate(value):
        _check_text(option, f"{field}[{index}]", True)
        if option in value[:index]:
            raise BadRequestError("repeats an earlier option", f"{field}[{index}]")

"""The commands that the documents show exist, with the options they show."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from mp2.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").glob("*.sh")),
]


def shown_commands() -> list[tuple[str, str]]:
    """(file, command) for every ``mp2 ...`` line of a code block or script."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text("utf-8")
        blocks = [text] if path.suffix == ".sh" else re.findall(r"```\w*\n(.*?)```", text, re.S)
        for block in blocks:
            for line in block.replace("\\\n", " ").split("\n"):
                if line.startswith("mp2 "):
                    found.append((path.name, re.split(r"\s{3,}|\s+#\s", line)[0]))
    return found


@pytest.mark.parametrize(("file", "line"), shown_commands())
def test_shown_command_exists_with_its_options(file: str, line: str) -> None:
    words = shlex.split(re.sub(r"\[.*?\]", "", line))[1:]
    command: click.Command = main
    while words and isinstance(command, click.Group) and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert command is not main, f"{file}: no command in {line!r}"
    options = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    shown = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
    assert shown <= options, f"{file}: {line!r} shows {sorted(shown - options)}"


def test_the_documents_show_commands() -> None:
    assert len(shown_commands()) >= 10

"""The commands that the documents show exist, with the options they show."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import click
import pytest

from mp2.cli import main
from mp2.tasks import check_task

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


def test_the_card_of_the_tasks_page_is_good_and_its_example_fits_it(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tasks.md").read_text("utf-8")
    (card,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    (tmp_path / "reviews.toml").write_text(card, "utf-8")
    (line,) = re.findall(r"my_data/reviews/train\.jsonl\s+(\{.*\})", page)
    (tmp_path / "my_data" / "reviews").mkdir(parents=True)
    labels = ["good", "bad", "good", "bad"]
    lines = [line.replace("房间", f"房间{i}").replace("good", label) for i, label in enumerate(labels)]
    (tmp_path / "my_data" / "reviews" / "train.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    report = check_task(str(tmp_path / "reviews.toml"), tmp_path / "my_data")
    assert report.ok, str(report)
    assert report.n_by_label == {"train": {"bad": 2, "good": 2}}


def test_the_reference_of_the_commands_is_fresh() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["page"]()
    assert (ROOT / "docs" / "reference.md").read_text("utf-8") == written, (
        "run: python docs/make_reference.py"
    )


def test_the_table_of_sources_is_fresh() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "make_sources.py"))["page"]()
    assert (ROOT / "docs" / "sources.md").read_text("utf-8") == written, "run: python docs/make_sources.py"


def test_the_picture_can_be_drawn_again(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "docs" / "pictures" / "make_idea.py"))["main"](tmp_path / "idea.svg")
    assert "<svg" in (tmp_path / "idea.svg").read_text("utf-8")


def test_the_documents_show_commands() -> None:
    assert len(shown_commands()) >= 10

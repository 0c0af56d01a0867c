"""The commands that the documents show exist, with the options they show."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from warm_programs import run_script

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


@pytest.mark.parametrize("document", ["README.md", "docs/tasks.md"])
def test_the_card_that_is_shown_is_good_and_its_example_fits_it(tmp_path: Path, document: str) -> None:
    page = (ROOT / document).read_text("utf-8")
    card = re.findall(r"```toml\n(.*?)```", page, re.S)[0]
    (tmp_path / "reviews.toml").write_text(card, "utf-8")
    line = re.findall(r"my_data/reviews/train\.jsonl:?\s+(\{.*?\})", page)[0]
    (tmp_path / "my_data" / "reviews").mkdir(parents=True)
    labels = ["good", "bad", "good", "bad"]
    lines = [line.replace("房间", f"房间{i}").replace("good", label) for i, label in enumerate(labels)]
    (tmp_path / "my_data" / "reviews" / "train.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    report = check_task(str(tmp_path / "reviews.toml"), tmp_path / "my_data", test=False)
    assert report.ok, str(report)
    assert report.n_by_label == {"train": {"bad": 2, "good": 2}}


def test_the_program_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MP2_DATA", raising=False)
    exec(compile(program.replace("iters=300", "iters=41"), "README.md", "exec"), {})
    assert "'label': 'sports'" in capsys.readouterr().out


QUICK = [
    "--iters",
    "12",
    "--router-iters",
    "6",
    "--popsize",
    "3",
]  # added to what tunes: seconds, not minutes


def test_the_commands_of_a_task_of_ones_own_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of docs/tasks.md, and README's of the card that it shows, but for those that load from the web."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MP2_DATA", raising=False)
    rows = [f"房间{i}很{'干净' if i % 2 else '脏'},{'good' if i % 2 else 'bad'}\n" for i in range(40)]
    Path("reviews.csv").write_text("text,label\n" + "".join(rows), "utf-8")
    Path("texts.txt").write_text("房间很干净\n", "utf-8")
    Path("new.txt").write_text("房间很干净\n", "utf-8")
    Path("my_data/reviews").mkdir(parents=True)
    lines = [json.dumps(dict(zip(("text", "label"), row.strip().split(","), strict=True))) for row in rows]
    Path("my_data/reviews/train.jsonl").write_text("\n".join(lines), "utf-8")
    shown = [(file, line) for file, line in shown_commands() if "reviews" in line or file == "tasks.md"]
    n_run = 0
    for file, line in sorted(shown, key=lambda pair: pair[0] == "README.md"):  # tasks.md makes the card
        words = shlex.split(line)[1:]
        if words[:2] == ["tasks", "fetch"]:
            continue
        stdin = Path("texts.txt").read_text("utf-8") if "<" in words else None
        words = words[: words.index("<")] if "<" in words else words
        words = [str(next(Path("runs").glob("*"))) if word.startswith("runs/") else word for word in words]
        done = CliRunner().invoke(main, [*words, *(QUICK if words[0] == "bbt" else [])], input=stdin)
        assert done.exit_code == 0, (file, line, done.output)
        n_run += 1
    assert n_run >= 9


@pytest.mark.slow
def test_the_script_of_the_quickstart_runs_in_an_empty_folder(warm: dict[str, str], tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text("utf-8"), re.S)
    text = "set -euo pipefail\n" + "\n".join(blocks)
    killed = "mp2 bbt --task demo_sentiment --iters 200 --threads 1 --out stopped &"
    assert killed in text
    text = text.replace(killed, f"{sys.executable} -m {killed}")  # a process of its own
    said = run_script(warm, "-c", text, cwd=tmp_path)
    assert said.count('"label"') == 2
    assert (tmp_path / "stopped").exists()
    assert len(list(tmp_path.glob("stopped/*/result.json"))) == 1
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 3


def test_the_documents_are_linked_to_what_exists() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text("utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_readme_keeps_to_its_size() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


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

"""docs/training.md: its commands, run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from warm_programs import run_script

from mp2.cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs" / "training.md"


@pytest.mark.slow
def test_every_command_of_the_page_works_in_an_empty_folder(warm: dict[str, str], tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 7
    script = "set -euo pipefail\n" + "\n".join(blocks)
    run_script(warm, "-c", script, cwd=tmp_path)
    listed = re.findall(r"^\| `([^`]+)`(?:, `([^`]+)`)? \|", DOCS.read_text("utf-8"), re.MULTILINE)
    files = {name for pair in listed for name in pair if re.search(r"[./]", name) and "-" not in name}
    assert "prompts.safetensors" in files
    missing = [
        name for name in files - {"backbone/", "tensorboard/"} if not (tmp_path / "prompts" / name).exists()
    ]
    assert not missing
    for name in ("config.json", "vocab.txt", "model.safetensors", "curves.png", "model_card.md"):
        assert (tmp_path / "backbone" / name).is_file()
    assert "mp2 pretrain --tasks my_tasks/mood.toml my_tasks/subject.toml" in (
        tmp_path / "prompts" / "model_card.md"
    ).read_text("utf-8")
    assert "torchrun" in (tmp_path / "prompts2" / "model_card.md").read_text("utf-8")


def test_every_option_of_the_page_exists() -> None:
    known = {
        option
        for command in ("pretrain", "pretrain-backbone", "bbt", "tasks")
        for parameter in main.commands[command].params
        for option in [*parameter.opts, *parameter.secondary_opts]
    }
    known |= {"--data", "--standalone", "--nproc-per-node", "--logdir"}
    text = re.sub(r"python -m [^`\n]*", "", DOCS.read_text("utf-8"))  # tests/test_docs_programs.py has these
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)):
        assert option in known, option

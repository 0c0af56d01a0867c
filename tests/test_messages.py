"""Lines of 400 characters at most, whoever prints them, and nothing in them that a terminal obeys."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import mp2
from tuning_world import CARD

from mp2.messages import LONGEST_LINE, printable, say, shortened

ROOT = Path(__file__).parents[1] / "mp2"
LONG = "很长" * 1500
CLASSIFIED = {"type": "classification", "template": "“{text}”，选项：{options}", "metric": "accuracy"}


def short(text: str) -> bool:
    return all(len(line) <= LONGEST_LINE for line in text.splitlines())


def test_no_line_of_a_message_has_more_than_400_characters() -> None:
    text = shortened("short\n" + "x" * 5000 + "END")
    assert [len(line) for line in text.split("\n")] == [5, 400]
    assert text.endswith("END")
    assert shortened("a\x1b[31mb\n\tc") == "a\\x1b[31mb\n\tc"
    assert printable("\x9b2J\x7f\r好") == "\\x9b2J\\x7f\\r好"


def test_what_a_library_module_says_is_cut_too(capsys: pytest.CaptureFixture[str]) -> None:
    say(LONG + "\x1b[2J")
    said = capsys.readouterr().err
    assert short(said)
    assert said.startswith("mp2: 很长")
    assert "\x1b" not in said


def test_nothing_prints_past_the_one_place() -> None:
    """``print`` and ``click.echo`` stand where lines are cut, and where programs read what is printed."""
    for path in ROOT.rglob("*.py"):
        name = str(path.relative_to(ROOT))
        if name in ("messages.py", "commands/printing.py", "export/bundle_files/run.py"):
            continue
        code = re.sub(r'"""[\s\S]*?"""', "", path.read_text("utf-8"))
        for call in re.findall(r"(?:(?<![.\w])print|click\.echo)\(.*", code):
            assert re.match(r"click\.echo\((as_json|markdown)", call), f"{path}: {call}"


def test_warnings_are_lines() -> None:
    """In a process of its own: tests make errors of warnings, and commands in them change them."""
    code = (
        "from mp2.messages import warnings_are_lines as a; import warnings; "
        "assert warnings.formatwarning.__module__ == 'warnings'; a(); warnings.warn('x\\ny' * 900)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"mp2: warning: x y.{300,}\n", done.stderr)
    assert short(done.stderr)


def test_long_names_labels_and_paths_are_cut_on_both_streams(tmp_path: Path) -> None:
    labels = "\n".join(f'"{LONG[:900]}{i}" = "{LONG[:700]}{i}"' for i in range(3))
    card = tmp_path / "card.toml"
    card.write_text(CARD.format(task=LONG[:600], labels=f"[labels]\n{labels}", **CLASSIFIED), "utf-8")
    deep = tmp_path / "/".join(["路" * 60] * 8)
    deep.mkdir(parents=True)
    rows = [json.dumps({"text": LONG, "label": LONG[:900] + str(i % 4)}) for i in range(9)]
    (deep / "train.jsonl").write_text("\n".join(rows) + "\n")
    typed = ("--precision", "fp16")
    for words in (
        ("tasks", "check", card, "--data", deep / "train.jsonl"),
        ("tasks", "show", card, "--data", deep / "train.jsonl"),
        ("tasks", "new", deep / "train.jsonl", "--out", tmp_path / "new.toml"),
        ("bbt", "--task", card, "--data", deep / "train.jsonl", "--explain"),
        ("bbt", "--task", LONG),
        ("tasks", "fetch", LONG, "--to", tmp_path / "to"),
        ("predict", "--run", deep, "--input", "-"),
        ("export", "--backbone", LONG, "--out", tmp_path / "e"),
        ("export", "--backbone", "mini", "--prompts", LONG, *typed, "--out", tmp_path / "e"),
        ("scratch", "--like", LONG, "--out", tmp_path / "p"),
        ("scratch", "--head", LONG, "--out", tmp_path / "p"),
        ("compare", deep),
        ("baselines", "--task", LONG),
        ("serve", "--bundle", LONG),
        (LONG,),
        (f"--{LONG}",),
        ("bbt", f"--{LONG}"),
    ):
        done = mp2(*words)
        assert isinstance(done.exception, SystemExit | None), (words[:2], done.exception)
        assert done.exit_code in (0, 2), (words[:2], done.output)
        assert short(done.stdout), words[:2]
        assert short(done.stderr), words[:2]

"""The command line as tests type it, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from mp2.cli import main


def mp2(*words: object, input: str | None = None) -> Result:
    """What ``mp2 WORDS`` prints and exits with."""
    return CliRunner().invoke(main, [str(word) for word in words], input=input)


def mp2_json(*words: object) -> Any:
    """The result of ``mp2 WORDS --json``, which must succeed."""
    done = mp2(*words, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def predictions(run_dir: str | Path, source: str | Path, input: str | None = None) -> list[dict[str, Any]]:
    """What ``mp2 predict`` says of a file's lines (``-``: of ``input``'s), which must succeed."""
    done = mp2("predict", "--run", run_dir, "--input", source, input=input)
    assert done.exit_code == 0, (done.output, done.exception)
    return [json.loads(line) for line in done.stdout.splitlines()]


def predicted_accuracy(run_dir: str | Path, examples: Path) -> float:
    """Share of the labelled examples in a file that ``mp2 predict`` labels right."""
    gold = [json.loads(line)["label"] for line in examples.read_text("utf-8").splitlines()]
    found = [prediction["label"] for prediction in predictions(run_dir, examples)]
    assert len(found) == len(gold)
    return sum(f == g for f, g in zip(found, gold, strict=True)) / len(gold)

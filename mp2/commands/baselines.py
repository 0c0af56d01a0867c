"""``mp2 baselines``: what the same few-shot examples give without any tuning."""

from __future__ import annotations

from typing import Any

import click

from mp2.commands.options import build, config_options
from mp2.commands.printing import as_json_text, note, show, show_table
from mp2.runs.config import BbtConfig

# of a run's options, those that say which examples it has, and what their encoder is
_READ = ("task", "data", "field", "backbone", "revision", "seed", "shots", "max_tokens", "test_limit")


@click.command(short_help="Score simple baselines on a task's few-shot examples.")
@config_options(BbtConfig, keep=_READ)
@click.option("--no-probe", is_flag=True, help="No linear probe: no backbone is loaded.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def baselines(no_probe: bool, as_json: bool, **typed: Any) -> None:
    """Majority class, TF-IDF with logistic regression, a linear probe on the frozen encoder's states."""
    from mp2.runs.baselines import baseline_rows, read_baselines, task_baselines

    found = task_baselines(build(BbtConfig, typed), probe=not no_probe)
    if as_json:
        click.echo(as_json_text(found))
        return
    counts = ", ".join(f"{n} {split}" for split, n in found["examples"].items())
    probe = f"  probe of {found['backbone']}" if found["backbone"] else ""
    show(f"{found['task']}  seed {found['seed']}  {counts} examples{probe}")
    rows = baseline_rows(read_baselines(found["baselines"]))
    show_table(rows, ("", f"dev {found['metric']}", f"test {found['metric']}"), numbers_from=1)
    for remark in found["remarks"]:
        note(remark)

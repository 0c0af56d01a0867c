"""``mp2 baselines``: what the same few-shot examples give without any tuning."""

from __future__ import annotations

from typing import Any

import click

from mp2.commands.options import BACKBONE, TASK, field_option, revision_option
from mp2.commands.paths import PATH
from mp2.commands.printing import as_json_text, note, show, show_table


@click.command(short_help="Score simple baselines on a task's few-shot examples.")
@click.option(
    "--task", required=True, type=TASK, help="A name of 'mp2 tasks', or your own card (a TOML file)."
)
@click.option(
    "--data", type=PATH, help="Folder with NAME/train.*, a training file, or hub:NAME; or MP2_DATA."
)
@field_option
@click.option(
    "--backbone", default="mini", show_default=True, type=BACKBONE, help="Encoder of the linear probe."
)
@revision_option
@click.option("--no-probe", is_flag=True, help="No linear probe: no backbone is loaded.")
@click.option("--seed", default=8, show_default=True, help="Draws the few-shot split, as of 'mp2 bbt'.")
@click.option("--shots", type=int, help="Examples a label (in all, if the task has no labels).")
@click.option(
    "--max-tokens", type=int, help="Longest sequence of the probe.  [default: what the backbone allows]"
)
@click.option("--test-limit", type=int, help="Score the first N test examples only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def baselines(task: str, backbone: str, no_probe: bool, as_json: bool, **options: Any) -> None:
    """Majority class, TF-IDF with logistic regression, a linear probe on the frozen encoder's states."""
    from mp2.runs.baselines import baseline_rows, read_baselines, task_baselines
    from mp2.runs.config import BbtConfig

    found = task_baselines(BbtConfig(task=task, backbone=backbone, **options), probe=not no_probe)
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

"""Results for people: what ``mp2 bbt`` and ``mp2 tune`` print of a run, and of several."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from mp2.commands.printing import show, show_table
from mp2.runs.baselines import baseline_rows, read_baselines
from mp2.runs.compare import STAGES
from mp2.runs.progress import clock, percent

_WHAT = {"untuned": " (every module on)", "stage1": " (router)", "stage2": " (selected)"}


def show_result(result: dict[str, Any]) -> None:
    """Print a line a stage, then where and how long."""
    show(
        f"{result['task']}  {result['method']}  seed {result['seed']}  backbone {result['backbone']}"
        f"  router search {result['router_search']}"
    )
    rows, scores = [], []
    for name, label in STAGES.items():
        stage = result["stages"].get(name)
        if stage is not None:
            loss, test = stage["train_loss"], stage["test_score"]
            scores += [score is not None for score in (test, stage["dev_score"])]
            cells = [
                "-" if loss is None else f"{loss:.4f}",
                "-" if stage["dev_score"] is None else percent(stage["dev_score"]),
            ]
            rows.append([label + _WHAT[name], *cells, "-" if test is None else percent(test)])
    for name, dev, test in baseline_rows(read_baselines(result["baselines"] or {})):
        rows.append([name, "", dev, test])
    metric = result["metric"]
    show_table(rows, ("", "train loss", f"dev {metric}", f"test {metric}"), numbers_from=1)
    if not any(scores):
        show("no dev and no test examples: nothing here says how good it is; a dev or test file would")
    seconds, engine = result["seconds"], result["engine"]
    show(
        f"{result['iterations']} iterations in {clock(seconds['stage1'] + seconds['stage2'])}"
        f" (stage I {seconds['stage1']:.1f} s, stage II {seconds['stage2']:.1f} s;"
        f" forward {seconds['forward']:.1f} s, suggest {seconds['suggest']:.1f} s,"
        f" journal {seconds['journal']:.1f} s, other {seconds['other']:.1f} s),"
        f" dev {seconds['dev']:.1f} s  [{engine['runtime']}, {engine['precision']}, {engine['device']}]"
    )
    if line := calibration_line(result.get("calibration")):
        show(line)
    if result["non_finite_losses"]:
        show(f"{result['non_finite_losses']} candidates had losses that were NaN or infinite")
    if result["stages"].get("stage2") and result["selected"]["at"] != "stage2":
        by = "the training loss" if result["dev_score"] is None else "dev"
        show(f"selected by {by}: {result['selected']['at']}, no later prompt was better")
    if result["verdict"]:
        show(result["verdict"])
    show(result["run_dir"])
    show(f"label new text with it: mp2 predict --run {shlex.quote(result['run_dir'])} --input FILE")


def calibration_line(found: dict[str, Any] | None) -> str | None:
    """What was done to the probabilities, and how far they are from shares of right answers."""
    if found is None:
        return None
    errors = [f"{split} {found[split]['error']:.2f}" for split in ("dev", "test") if found[split]]
    error = f"; expected calibration error {', '.join(errors)}" if errors else ""
    if found["by"] == "dev":
        before = found["test"] or found["dev"]
        change = f" ({before['error_before']:.2f} before)" if before else ""
        return f"probabilities: temperature {found['temperature']:.2f}, fitted on dev{error}{change}"
    if found["by"] is None:
        return f"probabilities: not calibrated, there is no dev set{error}"
    return f"probabilities: temperature fitted to the training examples, each left out{error}"


def show_series(results: Sequence[dict[str, Any]]) -> None:
    """Print a line a run, and for every setting the mean and standard deviation over its seeds."""
    from mp2.runs.compare import in_common, table

    head, rows = table(results)
    show(in_common(results))
    show_table(rows, head, numbers_from=head.index("seed") + 1)

"""Losses and scores over iterations: a run as a picture with its baselines, several runs in one picture.

A run of ``mp2 bbt`` has them in its journal; one of ``mp2 tune``, which has none, in ``curve.json``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mp2.files import write_bytes, write_json
from mp2.json_files import Fields, check, list_of, number, read_object
from mp2.optimizers.two_stage import Outcome
from mp2.runs.journal import read_journal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE = "curve.json"
_POINTS = list_of(list_of(number(), 2))
_CURVE = Fields({"loss": _POINTS, "dev": _POINTS})
_STYLES = {"majority": ":", "no_answer": ":", "whole_context": ":", "probe": "--"}
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """(iteration, value) of the incumbent's training loss, and of the score on dev."""

    loss: Points = field(default_factory=list)
    dev: Points = field(default_factory=list)


def write_curve(path: Path, outcome: Outcome) -> None:
    """Write what :func:`read_curve` reads."""
    loss = [(iteration, value) for iteration, value in outcome.loss_curve if math.isfinite(value)]
    write_json(path, asdict(Curve(loss, outcome.dev_curve)))


def read_curve(run_dir: Path) -> Curve:
    """The curve of a run, ended or not; empty where it has written nothing.

    Raises:
        FormatError: its journal or curve cannot be read.
    """
    journal, path = run_dir / "journal.jsonl", run_dir / CURVE
    if journal.exists():
        return _journaled(journal)
    if not path.exists():
        return Curve()
    stored = check(read_object(path), _CURVE, path)
    return Curve(*([(int(i), float(v)) for i, v in stored[name]] for name in ("loss", "dev")))


def _journaled(path: Path) -> Curve:
    curve, best = Curve(), math.inf
    for record in read_journal(path)[1]:
        last = record.lines[-1]
        if record.event == "losses":
            best = min([best, *(line["loss"] for line in record.lines if line["loss"] is not None)])
            if math.isfinite(best):
                curve.loss.append((last["iteration"], best))
        elif last["split"] == "dev":
            curve.dev.append((last["iteration"], last["score"]))
    return curve


def draw_curve(path: Path, outcome: Outcome, result: Mapping[str, Any]) -> None:
    """Draw a run as a PNG: the incumbent's loss, scores, and as level lines the baselines of the same split.

    Scores are those on dev; where there is no dev set, the stages' on test, if there is that.
    """
    figure = _figure(7, 4)
    loss_axis = figure.subplots()
    loss_axis.step(*zip(*outcome.loss_curve, strict=True), where="post", color="tab:blue", label="train loss")
    loss_axis.set_xlabel("iterations")
    loss_axis.set_ylabel("train loss of the incumbent", color="tab:blue")
    loss_axis.axvline(outcome.stage1.iteration, color="0.7", linestyle=":")
    split, points = "dev", list(outcome.dev_curve)
    if not points:
        stages = [stage for stage in result["stages"].values() if stage["test_score"] is not None]
        split, points = "test", [(stage["iteration"], stage["test_score"]) for stage in stages]
    if points:
        score_axis = loss_axis.twinx()
        score_axis.plot(*zip(*points, strict=True), ".-", color="tab:orange", label=split)
        score_axis.set_ylabel(f"{split} {result['metric']}", color="tab:orange")
        _draw_baselines(score_axis, result["baselines"] or {}, split)
        score_axis.legend(fontsize="small", loc="best")
    loss_axis.set_title(f"{result['task']}  {result['method']}  seed {result['seed']}")
    _save(figure, path)


def draw_comparison(
    path: Path,
    curves: Sequence[tuple[str, Points, Points]],
    baselines: Mapping[str, Any],
    split: str,
    metric: str,
) -> None:
    """Draw several runs as a PNG: losses on the left, scores on a split on the right.

    ``curves`` are (name, losses, scores); runs of one name (the seeds of one setting) have one colour.
    ``baselines`` are level lines: of one task's runs, the only ones that have them in common.
    """
    figure = _figure(11, 4.5)
    loss_axis, score_axis = figure.subplots(1, 2)
    names = list(dict.fromkeys(name for name, _, _ in curves))
    for name, losses, scores in curves:
        colour = f"C{names.index(name) % 10}"
        if losses:
            loss_axis.step(*zip(*losses, strict=True), where="post", color=colour)
        if scores:
            score_axis.plot(*zip(*scores, strict=True), ".-", color=colour)
    for index, name in enumerate(names):
        loss_axis.plot([], [], color=f"C{index % 10}", label=name)
    _draw_baselines(score_axis, baselines, split)
    loss_axis.set(xlabel="iterations", ylabel="train loss of the incumbent")
    score_axis.set(xlabel="iterations", ylabel=f"{split} {metric}")
    for axis in (loss_axis, score_axis):
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
    _save(figure, path)


def _draw_baselines(axis: Axes, baselines: Mapping[str, Any], split: str) -> None:
    for key, line in baselines.items():
        score = line[f"{split}_score"]
        if score is not None:
            axis.axhline(
                score, color="0.4", linestyle=_STYLES.get(key, "-."), linewidth=1, label=line["name"]
            )


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    write_bytes(path, picture.getvalue())

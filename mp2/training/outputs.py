"""What a finished pre-training gives back and leaves beside the prompt file: scores, routers, curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mp2.backbone.load import Backbone
from mp2.files import whole_file, write_bytes, write_json, write_text
from mp2.prompts import PromptSet
from mp2.training.checkpoint import SCORES_LINE, read_steps
from mp2.training.config import PretrainConfig
from mp2.training.mixture import MixtureTask
from mp2.training.model_card import prompts_card
from mp2.training.ranks import Ranks


@dataclass(frozen=True)
class PretrainResult:
    """Prompts, the backbone they belong to, dev scores of each task before and after, and the run's numbers.

    ``seconds`` is the time spent in steps; ``data_wait_share`` the share of it spent waiting for batches.
    """

    prompts: PromptSet
    backbone: Backbone
    scores: dict[str, dict[str, float]]
    skipped_steps: int
    seconds: float
    data_wait_share: float


def write_outputs(
    out: Path,
    result: PretrainResult,
    start: Backbone,
    tasks: Sequence[MixtureTask],
    config: PretrainConfig,
    ranks: Ranks,
    inputs: Mapping[str, Any],
) -> None:
    """Write ``scores.json``, ``routers.csv``, ``curves.png``, ``result.json`` and ``model_card.md``.

    ``start`` is the backbone that the run began with; ``inputs`` may have the ``command`` that was typed.
    """
    write_json(out / "scores.json", result.scores, indent=1)
    write_routers(out / "routers.csv", result.prompts, [task.card.family for task in tasks])
    title = f"{config.kind} prompts on {result.backbone.name}, {len(tasks)} tasks"
    draw_curves(out / "curves.png", out / "losses.jsonl", title, dev=out / "dev_scores.jsonl")
    trained = config.backbone_lr > 0
    numbers = {
        "prompts_sha256": result.prompts.sha256,
        "backbone_sha256_before": start.sha256,
        "backbone_sha256_after": result.backbone.sha256,
        "backbone_trained": trained,
        "steps": config.steps,
        "skipped_steps": result.skipped_steps,
        "seconds_in_steps": round(result.seconds, 3),
        "examples_per_s": round(config.steps * config.batch_size / result.seconds, 2),
        "data_wait_share": round(result.data_wait_share, 5),
        "processes": ranks.size,
        "device": ranks.device.type,
    }
    write_json(out / "result.json", numbers, indent=1)
    write_text(
        out / "model_card.md", prompts_card(result, start, tasks, config, ranks, inputs.get("command"))
    )


def write_routers(path: Path, prompts: PromptSet, families: Sequence[str]) -> None:
    """A line a task, layer and module: its logit, and whether (soft: how much) it is on at inference."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "family", "layer", "module", "logit", "active"])
        for number, (task, family) in enumerate(zip(prompts.meta.tasks, families, strict=True)):
            weights = prompts.router(task).tolist()
            for layer, logits in enumerate(prompts.routers[number].tolist()):
                for module, logit in enumerate(logits):
                    active = f"{weights[layer][module]:g}"
                    writer.writerow([task, family, layer, module, f"{logit:.6g}", active])


def draw_curves(path: Path, losses: Path, title: str, *, dev: Path | None = None) -> None:
    """Training loss (means over 200 windows) and, where there are any, dev scores by task, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_steps(losses)
    steps = np.array([line["step"] for line in lines])
    values = np.array([np.nan if line["loss"] is None else line["loss"] for line in lines])
    windows = [w for w in np.array_split(np.arange(len(values)), 200) if np.isfinite(values[w]).any()]
    figure = Figure(figsize=(11 if dev else 6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if dev else 1, squeeze=False)[0]
    axes[0].plot(
        [steps[w].mean() for w in windows], [np.nanmean(values[w]) for w in windows], color="tab:blue"
    )
    axes[0].set_xlabel("step")
    axes[0].set_ylabel("training loss (nats)")
    if dev:
        points = read_steps(dev, SCORES_LINE)
        at = [point["step"] for point in points]
        for task in points[0]["scores"]:
            axes[1].plot(at, [100 * point["scores"][task] for point in points], color="0.8", linewidth=0.8)
        means = [100 * float(np.mean(list(point["scores"].values()))) for point in points]
        axes[1].plot(at, means, ".-", color="tab:orange", label="mean")
        axes[1].set_xlabel("step")
        axes[1].set_ylabel("dev score (grey: a task)")
        axes[1].legend()
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    write_bytes(path, picture.getvalue())

"""Model cards of what a training run made: what it is, from what, how, and how good."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from mp2.backbone.load import Backbone
from mp2.training.config import PretrainConfig
from mp2.training.mixture import MixtureTask
from mp2.training.ranks import Ranks

if TYPE_CHECKING:
    from mp2.training.outputs import PretrainResult

_LICENCE = (
    "mp2's licence covers its code, not these weights. What may be done with them depends on the licences of "
    "{sources}: check those before passing the files on."
)


def prompts_card(
    result: PretrainResult,
    start: Backbone,
    tasks: Sequence[MixtureTask],
    config: PretrainConfig,
    ranks: Ranks,
    command: str | None,
) -> str:
    """The card of pre-trained prompts, as Markdown."""
    meta, shape = result.prompts.meta, result.backbone.config
    trained = config.backbone_lr > 0
    rows = [
        "| task | family | type | training sequences | dev examples | metric | dev before | dev after |",
        "| --- | --- | --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for task in tasks:
        card, scores = task.card, result.scores[task.card.task]
        rows.append(
            f"| {card.task} | {card.family} | {card.type} | {len(task.train)} | {len(task.dev_examples)} | "
            f"{card.metric} | {100 * scores['before']:.1f} | {100 * scores['after']:.1f} |"
        )
    means = [100 * float(np.mean([s[key] for s in result.scores.values()])) for key in ("before", "after")]
    total = sum(len(task.train) for task in tasks)
    rows.append(f"| all {len(tasks)} | | | {total} | | mean | {means[0]:.1f} | {means[1]:.1f} |")
    if trained:
        weights = (
            "**The backbone's weights were trained in this run too** (on the tasks below, learning rate "
            f"{config.backbone_lr:g}): it is not purely self-supervised. The new backbone is in `backbone/`, "
            f"hash `{result.backbone.sha256}`; the run began with `{start.sha256}`."
        )
    else:
        weights = (
            f"The backbone was frozen: its hash before and after the run is `{result.backbone.sha256}`. "
            "Whether an earlier stage trained its weights on tasks, its own card says."
        )
    skipped = f"{result.skipped_steps} steps had a non-finite loss or gradient and were skipped."
    return "\n".join(
        [
            f"# Modular prompts ({meta.kind}, {meta.injection}) for {result.backbone.name}",
            "",
            f"Made by method {config.method}. "
            f"{meta.n_modules} modules of {meta.prompt_tokens} prompt tokens at "
            f"{'each of ' if meta.kind == 'deep' else 'the input of '}{shape.n_layers} layers "
            f"(hidden size {shape.hidden}), intrinsic dimension {meta.intrinsic_dim}, a router for each of "
            f"{len(tasks)} tasks ({meta.router_inference} at inference, divided by the "
            f"{meta.router_normalisation}), and a span head: `prompts.safetensors`. Routers as a table: "
            "`routers.csv`. Curves: `curves.png`.",
            "",
            weights,
            "",
            "## Data and dev scores",
            "",
            "Scores in per cent on dev examples, under each task's own router; nothing was trained on them.",
            "",
            *rows,
            "",
            *_how(config, ranks, command, result.seconds),
            skipped,
            "",
            "## Licence",
            "",
            _LICENCE.format(sources=f"the backbone `{start.name}` and of the data sets above"),
            "",
        ]
    )


def backbone_card(
    backbone: Backbone, config: Any, ranks: Ranks, command: str | None, facts: dict[str, Any]
) -> str:
    """The card of a backbone trained by masked language modelling, as Markdown.

    ``facts``: ``files`` (name, bytes, sha256 of each), ``sequences``, ``seconds``, ``skipped_steps``,
    ``first_loss``, ``last_loss`` (means over the first and the last twentieth of the steps; None where all
    were skipped).
    """
    shape = backbone.config
    parameters = sum(p.numel() for p in backbone.encoder.parameters())
    files = [f"| {name} | {size:,} | `{sha256[:16]}` |" for name, size, sha256 in facts["files"]]
    return "\n".join(
        [
            f"# Backbone {backbone.name}",
            "",
            f"A post-LN encoder of {shape.n_layers} layers, hidden size {shape.hidden}, {shape.n_heads} "
            f"heads, {shape.vocab_size:,} tokens, {shape.max_positions} positions; {parameters / 1e6:.1f} M "
            f"parameters. Weights hash `{backbone.sha256}`. Trained by masked language modelling "
            f"({config.masking} masking) on plain text alone: purely self-supervised.",
            "",
            f"Loss (nats a masked token): {_nats(facts['first_loss'])} over the first twentieth of the "
            f"steps, {_nats(facts['last_loss'])} over the last. Curve: `curves.png`.",
            "",
            "## Data",
            "",
            f"{facts['sequences']:,} sequences of {config.length} tokens from",
            "",
            "| file | bytes | sha256 |",
            "| --- | ---: | --- |",
            *files,
            "",
            *_how(config, ranks, command, facts["seconds"]),
            f"{facts['skipped_steps']} steps had a non-finite loss or gradient and were skipped.",
            "",
            "## Licence",
            "",
            _LICENCE.format(sources="the texts above"),
            "",
        ]
    )


def _how(config: PretrainConfig | Any, ranks: Ranks, command: str | None, seconds: float) -> list[str]:
    processes = "1 process" if ranks.size == 1 else f"{ranks.size} processes (torchrun)"
    return [
        "## How",
        "",
        *(["```", command, "```", ""] if command else []),
        f"Seed {config.seed}; {processes} on {ranks.device.type}, {seconds / 60:.1f} minutes in steps. "
        "All settings:",
        "",
        "```json",
        json.dumps(asdict(config), indent=1),
        "```",
        "",
    ]


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"

"""A finished run as a task of a bundle: its prompt and head as graph inputs, its card as programs read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mp2.backbone import Backbone, load_backbone
from mp2.errors import FormatError, MismatchError, UsageError
from mp2.export.graphs import INLINE_GRAPH, PREFIX_GRAPH
from mp2.heads import RidgeSettings, SpanHead
from mp2.prompts import PrefixProjector
from mp2.runs.frozen_model import run_prompts
from mp2.runs.needs import located
from mp2.runs.run_folder import how_to_end, read_config
from mp2.runs.tuned import TunedMeta, check_fits, head_tensors, load_tuned, run_card, tuned_head
from mp2.tasks import ClozeFormatter, FieldFormatter, MrcFormatter, TaskCard, label_words
from mp2.tasks.card_rules import template_parts
from mp2.tasks.cloze import cloze_template
from mp2.tasks.mrc import CLOSING, MIN_TEXT_TOKENS, SEPARATOR

if TYPE_CHECKING:
    from mp2.prompts import PromptSet


@dataclass(frozen=True)
class TunedTask:
    """A run that goes into a bundle: what it tuned, and everything that its answers need."""

    run_dir: Path
    meta: TunedMeta
    card: TaskCard
    tensors: dict[str, torch.Tensor]  # the graph's inputs of one row, float32
    head_tensors: dict[str, torch.Tensor]  # what its head needs beside the graph's outputs
    graph: str

    @property
    def kind(self) -> str:
        """Its head's: span, mlm or ridge."""
        return str(self.meta.head["kind"])

    @property
    def prompt_length(self) -> int:
        """Its prompt's rows."""
        name = "prompt_keys" if self.graph == PREFIX_GRAPH else "prompt_rows"
        return int(self.tensors[name].shape[-2])


def run_backbone(run: Path, backbone: str | None, revision: str | None) -> Backbone:
    """Return the run's backbone, or the one that is named in its place."""
    moved = {"backbone": backbone, "revision": revision}
    config = located(run, read_config(run), moved, ("backbone",))
    return load_backbone(config.backbone, revision=config.revision)


def read_run(run_dir: Path, backbone: Backbone, prompts: str | None) -> TunedTask:
    """Return what the finished run in ``run_dir`` tuned; ``prompts`` says where its prompts are now.

    Raises UsageError (no run, deep inline prompts), FormatError (not ended, or damaged), MismatchError
    (another backbone or other prompts).
    """
    config = read_config(run_dir)
    try:
        z, meta = load_tuned(run_dir / "prompt.safetensors")
    except FormatError as error:
        raise FormatError(f"{error}; {how_to_end(run_dir)}") from error
    if meta.backbone_sha256 != backbone.sha256:
        raise MismatchError(
            f"{run_dir} was tuned on backbone '{meta.backbone}' (weights {meta.backbone_sha256[:12]}), "
            f"expected '{backbone.config.name}' (weights {backbone.sha256[:12]}): a bundle has one backbone; "
            "make one bundle for each, or name with --backbone where the runs' backbone is now"
        )
    config = located(run_dir, config, {"prompts": prompts}, ("prompts",))
    prompt_set = run_prompts(config, backbone)
    check_fits(meta, z, prompt_set, backbone_sha256=backbone.sha256)
    if not prompt_set.meta.prompt_tokens:
        raise UsageError(
            f"{run_dir} has no prompt (model or head tuning), and a bundle is one backbone under several: "
            "answer with 'mp2 predict'"
        )
    if prompt_set.meta.on_placeholders:
        raise UsageError(
            f"the {prompt_set.kind} prompts of {run_dir} were trained with {prompt_set.meta.injection} "
            "injection, and graphs of whole backbones have keys and values, or word-embedding rows; tune "
            "with prompts trained with the default --injection, or answer with 'mp2 predict'"
        )
    card = run_card(run_dir, meta)
    if card.type == "multiple_choice" and meta.head["kind"] == "mlm":
        raise UsageError(
            f"{run_dir} answers multiple choice with the letters of its options, which bundles do not write; "
            "answer with 'mp2 predict'"
        )
    words = label_words(card, backbone.tokenizer) if meta.head["kind"] == "mlm" else ()
    head = tuned_head(run_dir / "prompt.safetensors", meta, backbone, prompt_set, words)
    tensors = _tensors(backbone, prompt_set, torch.from_numpy(z), with_head=isinstance(head, SpanHead))
    own = {name: torch.from_numpy(array) for name, array in head_tensors(head).items()}
    graph = PREFIX_GRAPH if "prompt_keys" in tensors else INLINE_GRAPH
    task = TunedTask(run_dir, meta, card, tensors, own, graph)
    written_text(task, backbone)  # raises where the task does not fit its sequences
    return task


def _tensors(
    backbone: Backbone, prompts: PromptSet, z: torch.Tensor, *, with_head: bool
) -> dict[str, torch.Tensor]:
    """Return the inputs of a row of the batch, without its first axis, for the tuned ``z`` [L', d].

    The span head is zeros for a task that another head reads: rows of a batch may mix heads.
    """
    projector = PrefixProjector(backbone.encoder, prompts)
    head = {"span_weight": prompts.span_weight.float(), "span_bias": prompts.span_bias.float()}
    if not with_head:
        head = {name: torch.zeros_like(x) for name, x in head.items()}
    if prompts.meta.n_inline:
        return {"prompt_rows": projector.inline(z)[0].float(), **head}  # [m, H]
    layers = [projector.keys_values(i, z[i : i + 1]) for i in range(len(z))]
    keys, values = (torch.cat(part).float() for part in zip(*layers, strict=True))  # [L, h, m, d_h]
    return {"prompt_keys": keys, "prompt_values": values, **head}


def named_tasks(tasks: Sequence[TunedTask]) -> dict[str, TunedTask]:
    """Return the tasks by their cards' names, with the seed where runs share one; UsageError for twins."""
    cards = Counter(task.card.task for task in tasks)
    named: dict[str, TunedTask] = {}
    for task in tasks:
        name = task.card.task
        name = name if cards[name] == 1 else f"{name}-seed{task.meta.seed}"
        if name in named:
            raise UsageError(
                f"{named[name].run_dir} and {task.run_dir} are both runs of task '{task.card.task}' with "
                f"seed {task.meta.seed}: give one of them"
            )
        named[name] = task
    return named


def task_card(name: str, task: TunedTask, backbone: Backbone) -> dict[str, Any]:
    """Return what a task's JSON file holds: the card, and its text as token ids."""
    card, tokenizer = task.card, backbone.tokenizer
    options = [
        {"label": label, "word": word, "ids": tokenizer.encode(word).ids}
        for label, word in card.labels.items()
    ]
    return {
        "name": name,
        "task": card.task,
        "type": card.type,
        "template": card.template,
        "fields": list(card.fields),
        "options": options,
        "before": [tokenizer.cls_id],
        **written_text(task, backbone),
        "after": [tokenizer.sep_id],
        "max_tokens": task.meta.max_tokens,
        "least_room": MIN_TEXT_TOKENS,
        "unanswerable": card.unanswerable,
        "max_answer_tokens": card.max_answer_tokens,
        "graph": task.graph,
        "head": task.kind,
        "prompt_length": task.prompt_length,
        "temperature": task.meta.temperature,
        "run": {"folder": task.run_dir.resolve().name, "seed": task.meta.seed, "selected": task.meta.at},
        "prompts": {"name": Path(task.meta.prompts).name, "sha256": task.meta.prompts_sha256},
    }


def written_text(task: TunedTask, backbone: Backbone) -> dict[str, Any]:
    """Return how the head wants a line written: ``parts``, the ``room`` for its text, and what else it needs.

    Raises UsageError where that does not fit the task's sequences, or label words cannot be spelled.
    """
    card, tokenizer, max_tokens = task.card, backbone.tokenizer, task.meta.max_tokens

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text).ids if text else []

    def parts(pieces: Sequence[tuple[str, str | None]]) -> list[dict[str, Any]]:
        return [{"text": text, "ids": ids(text), "field": field} for text, field in pieces]

    if task.kind == "mlm":
        cloze = ClozeFormatter(card, tokenizer, max_tokens)
        return {
            "parts": parts(template_parts(cloze_template(card))),
            "room": cloze.room,
            "mask": tokenizer.mask_id,  # for the field `label`, as often as a label word has tokens
        }
    if task.kind == "ridge":
        fields = FieldFormatter(card, tokenizer, max_tokens)
        first, *others = ({"text": "", "ids": [], "field": field} for field in card.fields)
        settings = RidgeSettings.of(task.meta.head)
        return {
            "parts": [first, *(part | {"ids": [tokenizer.sep_id]} for part in others)],
            "room": fields.room,
            "layer": settings.layer,
            "scale": settings.temperature,
        }
    MrcFormatter(card, tokenizer, max_tokens)
    closing = ids(CLOSING) if card.type != "extraction" else []
    n_template = 2 + sum(len(ids(text)) for text, _ in card.parts)
    return {
        "parts": parts(card.parts),
        "separator": ids(SEPARATOR),
        "closing": closing,
        "room": max_tokens - n_template - len(closing),
    }

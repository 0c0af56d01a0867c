"""A task checked as ``mp2 bbt`` with the same options would read it: what ``mp2 tasks check`` runs.

Weights are loaded only where it matters whether the checkpoint has a head of its own.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

from mp2.errors import UsageError
from mp2.runs.config import BbtConfig
from mp2.runs.frozen_model import check_kind, default_prompts, sequence_length
from mp2.runs.head_choice import possible_heads
from mp2.runs.scratch import ON_THE_FLY, rows_at_input
from mp2.runs.task_data import formatters, has_room

if TYPE_CHECKING:
    from mp2.backbone import Backbone
    from mp2.tasks import TaskCard
    from mp2.tasks.check import CheckReport


def check_as_run(config: BbtConfig) -> CheckReport:
    """Validate the card and every line of its data; what ``mp2 bbt`` refuses is a fault.

    Raises:
        UsageError: nothing can be checked: no such card, data, backbone or prompts, or they do not fit.
    """
    from mp2.backbone import load_backbone
    from mp2.prompts import load_prompts
    from mp2.tasks.check import Reading, Readings, check_task
    from mp2.tasks.show import backbone_positions, backbone_tokenizer

    positions = backbone_positions(config.backbone, config.revision)
    tokenizer = backbone_tokenizer(config.backbone, config.revision)
    if (name := default_prompts(config)) in ON_THE_FLY:
        kind, has_span_head = ON_THE_FLY[name], False
        n_inline = rows_at_input(positions) if kind == "shallow" else 0
    else:
        prompts = load_prompts(name)
        kind = "shallow" if prompts.kind == "shallow" else "deep"
        n_inline, has_span_head = prompts.meta.n_inline, prompts.has_span_head
    check_kind(config, kind)
    max_tokens = sequence_length(config.max_tokens, positions, kind, n_inline)

    @cache
    def backbone() -> Backbone:
        return load_backbone(config.backbone, revision=config.revision)

    def readings(card: TaskCard) -> Readings:
        @cache
        def formatter(head: str) -> Any:
            return formatters()[head](card, tokenizer, max_tokens)

        heads = possible_heads(config.head, card, has_span_head, backbone)
        by_head: dict[str, Reading] = {}
        refused: dict[str, UsageError] = {}
        for head in heads:
            try:
                by_head[head] = formatter(head)
            except UsageError as error:
                refused[head] = error
        if heads[0] in refused and (heads[0] != "span" or not by_head):
            raise refused[heads[0]]
        taken = next(iter(by_head))
        remarks = [f"head {taken}: {head} cannot read this task ({why})" for head, why in refused.items()]
        if card.type == "multiple_choice":
            formatter("span")  # whatever the head; see has_room
        return Readings(by_head, partial(has_room, card, formatter), tuple(remarks))

    return check_task(
        config.task,
        config.data,
        readings=readings,
        shots=config.shots,
        dev=config.dev == "auto",
        test=config.test,
        fields=config.field,
    )

"""A task's examples as sequences of one backbone: read and tokenised once for all seeds of a series."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mp2.errors import UsageError

if TYPE_CHECKING:
    from mp2.runs.config import BbtConfig
    from mp2.runs.frozen_model import FrozenModel
    from mp2.runs.head_choice import Formatter
    from mp2.tasks import Example, MrcInput, TaskCard
    from mp2.tasks.baselines import States


N_MEASURED = 1000  # training texts whose lengths are measured


def formatters() -> dict[str, type[Any]]:
    """Head -> what writes examples for it."""
    from mp2.tasks import ClozeFormatter, FieldFormatter, MrcFormatter

    return {"span": MrcFormatter, "mlm": ClozeFormatter, "ridge": FieldFormatter}


def has_room(card: TaskCard, formatter: Callable[[str], Formatter], example: Example) -> bool:
    """Whether there is room for the options of an example that brings its own, whatever head reads it.

    The span head's sequences are the longest: with the same examples left out, heads can be compared.
    """
    return card.type != "multiple_choice" or formatter("span").fits(example)


class TaskData:
    """Train pool and test set of a task, for sequences of at most ``max_tokens``."""

    def __init__(self, config: BbtConfig, card: TaskCard, model: FrozenModel) -> None:
        from mp2.tasks.record import parse_fields

        self.card, self._backbone = card, model.backbone
        self.max_tokens = model.max_tokens(config.max_tokens)
        self._formatters: dict[str, Formatter] = {}
        self._test_inputs: dict[str, list[MrcInput]] = {}
        self._data = config.data
        self._fields = parse_fields(config.field, card)
        self._test_limit = config.test_limit

    def formatter(self, head: str) -> Formatter:
        """What writes examples for a kind of head; raises ``UsageError`` where the task does not suit it."""
        if head not in self._formatters:
            self._formatters[head] = formatters()[head](self.card, self._backbone.tokenizer, self.max_tokens)
        return self._formatters[head]

    def _fits(self, example: Example) -> bool:
        return has_room(self.card, self.formatter, example)

    @cached_property
    def pool(self) -> list[Example]:
        """The training examples that fit; few-shot splits are drawn from them."""
        return [e for e in self._load("train") if self._fits(e)]

    @cached_property
    def dev_pool(self) -> list[Example]:
        """The dev examples that fit, where the data has some of their own; else dev is drawn from train."""
        from mp2.tasks import has_split

        if not has_split(self.card, "dev", self._data):
            return []
        return [e for e in self._load("dev") if self._fits(e)]

    @cached_property
    def tests(self) -> list[Example]:
        """The test examples that are scored."""
        return self._load("test", self._test_limit)

    def _load(self, split: str, limit: int | None = None) -> list[Example]:
        from mp2.tasks import load_examples

        return load_examples(self.card, split, self._data, limit, self._fields)

    @cached_property
    def fitting_tests(self) -> list[Example]:
        """Those of :attr:`tests` that fit; raises ``UsageError`` if none does."""
        from mp2.tasks.lengths import none_fits

        fitting = [e for e in self.tests if self._fits(e)]
        if not fitting:
            raise UsageError(none_fits(self.card, self.max_tokens))
        return fitting

    def test_inputs(self, head: str) -> list[MrcInput]:
        """The sequences of :attr:`fitting_tests` for a kind of head."""
        if head not in self._test_inputs:
            self._test_inputs[head] = self.inputs(self.fitting_tests, head)
        return self._test_inputs[head]

    def lines(self, head: str) -> list[str]:
        """What of the training texts is cut to the longest sequence of a kind of head, in words."""
        from mp2.tasks.lengths import lengths

        examples, formatter = self.pool[:N_MEASURED], type(self.formatter(head))
        measured = lengths(self.card, self._backbone.tokenizer, self.max_tokens, examples, formatter)
        line = None if measured is None else measured.line("training texts")
        return [] if line is None else [line]

    @cached_property
    def states(self) -> States:
        """What a linear probe looks at; the states of an input are computed once for all seeds."""
        from mp2.runs.pooled_states import pooled_states

        return pooled_states(self._backbone, self.max_tokens)

    def inputs(self, examples: Sequence[Example], head: str) -> list[MrcInput]:
        """The sequences of examples for a kind of head, in their order."""
        formatter = self.formatter(head)
        return [made for i, e in enumerate(examples) for made in formatter.inputs(e, i)]

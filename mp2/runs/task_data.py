"""A task's examples as sequences of one backbone: read and tokenised once for all seeds of a series."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mp2.errors import UsageError

if TYPE_CHECKING:
    from mp2.runs.config import BbtConfig
    from mp2.runs.frozen_model import FrozenModel
    from mp2.tasks import Example, MrcInput, TaskCard


class TaskData:
    """Train pool and test set of a task, for sequences of at most ``max_tokens``."""

    def __init__(self, config: BbtConfig, card: TaskCard, model: FrozenModel) -> None:
        from mp2.tasks import MrcFormatter

        self.card = card
        self.max_tokens = model.max_tokens(config.max_tokens)
        self.formatter = MrcFormatter(card, model.backbone.tokenizer, self.max_tokens)
        self._folder = Path(config.data) if config.data else None
        self._test_limit = config.test_limit

    @cached_property
    def pool(self) -> list[Example]:
        """The training examples that fit; few-shot splits are drawn from them."""
        from mp2.tasks import load_examples

        return [e for e in load_examples(self.card, "train", self._folder) if self.formatter.fits(e)]

    @cached_property
    def tests(self) -> list[Example]:
        """The test examples that are scored."""
        from mp2.tasks import load_examples

        return load_examples(self.card, "test", self._folder, self._test_limit)

    @cached_property
    def fitting_tests(self) -> list[Example]:
        """Those of :attr:`tests` that fit; raises ``UsageError`` if none does."""
        fitting = [e for e in self.tests if self.formatter.fits(e)]
        if not fitting:
            raise UsageError(f"no test example of '{self.card.task}' fits {self.max_tokens} tokens")
        return fitting

    @cached_property
    def test_inputs(self) -> list[MrcInput]:
        """The sequences of :attr:`fitting_tests`."""
        return self.inputs(self.fitting_tests)

    def inputs(self, examples: Sequence[Example]) -> list[MrcInput]:
        """The sequences of examples, in their order."""
        return [made for i, e in enumerate(examples) for made in self.formatter.inputs(e, i)]

"""How long a task's texts are, and how many are cut to the longest sequence: said before any tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mp2.errors import UsageError
from mp2.tasks.card import TaskCard
from mp2.tasks.example import Example
from mp2.tasks.mrc import MrcFormatter

if TYPE_CHECKING:
    from mp2.backbone.tokenizer import Tokenizer

UNCUT = 1_000_000  # tokens: more than any example has


def tokens_allowed(requested: int | None, room: int, where: str = "") -> int:
    """Return the longest sequence: what was asked for, or all the ``room``; ``where`` that is the room."""
    if requested is not None and requested > room:
        raise UsageError(f"max_tokens is {requested}, expected at most {room}{where}")
    return requested or room


def none_fits(card: TaskCard, max_tokens: int) -> str:
    """Return what to say where no test example has room for its text beside its options."""
    return f"no test example of '{card.task}' fits {max_tokens} tokens"


@dataclass(frozen=True)
class Lengths:
    """Tokens of examples written out in full, and how many have more than ``max_tokens``."""

    max_tokens: int
    n: int
    n_long: int
    median: int
    longest: int
    median_lost: int  # tokens that those lose which are too long, the median of them
    in_windows: bool

    def line(self, what: str) -> str | None:
        """Return what is cut in words, of the examples called ``what``; None where nothing is."""
        if not self.n_long:
            return None
        done = (
            f"are read in windows of {self.max_tokens}"
            if self.in_windows
            else f"are cut to {self.max_tokens}, half of them by {self.median_lost} or more"
        )
        share = 100 * self.n_long / self.n
        return (
            f"{f'{share:.0f}' if share >= 1 else 'under 1'} % of the {what} are too long and {done} "
            f"(tokens: median {self.median}, longest {self.longest})"
        )


def lengths(
    card: TaskCard,
    tokenizer: Tokenizer,
    max_tokens: int,
    examples: Sequence[Example],
    formatter: Callable[[TaskCard, Tokenizer, int], Any] = MrcFormatter,
) -> Lengths | None:
    """Measure examples as the class ``formatter`` writes them out; None for none."""
    if not examples:
        return None
    uncut = formatter(card, tokenizer, UNCUT)
    n_tokens = np.array([max(made.n_tokens for made in uncut.inputs(e, 0)) for e in examples])
    long = n_tokens[n_tokens > max_tokens]
    return Lengths(
        max_tokens=max_tokens,
        n=len(n_tokens),
        n_long=len(long),
        median=int(np.median(n_tokens)),
        longest=int(n_tokens.max()),
        median_lost=int(np.median(long)) - max_tokens if len(long) else 0,
        in_windows=card.type == "extraction",
    )

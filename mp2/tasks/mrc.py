"""Examples as machine-reading-comprehension inputs: token ids and exact token spans (paper, appendix C).

An input is ``[CLS] filled template [SEP]``. Each piece of the template, field and option is tokenised on its
own and the pieces are joined, so every span is known from the pieces' lengths; nothing is searched for in the
result. Where the input is too long, the text fields are cut (the longest first); template words and options
never are. An extraction context is not cut but slid over by windows that overlap by more than a usual answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mp2.errors import UsageError
from mp2.tasks.card import TaskCard
from mp2.tasks.example import Answer, Example

if TYPE_CHECKING:
    from mp2.backbone.tokenizer import Pieces, Tokenizer

MIN_TEXT_TOKENS = 8  # room that template and options must leave to the text
SEPARATOR, CLOSING = "，", "。"  # between options and after the last (paper, Table 7)


@dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class MrcInput:
    """One token sequence with its gold span and the spans that may be predicted. All positions are inclusive.

    ``example`` is the index given to the formatter. ``start``, ``end`` is the gold span, (0, 0) = [CLS] where
    there is none (unanswerable, unlabelled, or not in this window). ``option_spans`` [n_options, 2]: the
    options of classification and multiple choice. ``context_span`` (first, last) and ``context_offsets``
    (characters [start, end) of each token between them, in the whole context) are for extraction.
    ``label`` is the number of the right option, -1 where it is not known. ``segments`` [S, 2] are the runs of
    tokens that a head other than the span head reads: text fields, or the [MASK] tokens.
    """

    example: int
    input_ids: npt.NDArray[np.int64]
    start: int
    end: int
    option_spans: npt.NDArray[np.int64]
    context_span: tuple[int, int] | None = None
    context_offsets: Sequence[tuple[int, int]] = ()
    label: int = -1
    segments: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))

    @property
    def n_tokens(self) -> int:
        """Tokens of the sequence, with [CLS] and [SEP]."""
        return len(self.input_ids)


class MrcFormatter:
    """Writes a task's examples as token sequences of at most ``max_tokens``.

    Raises ``UsageError`` at once where a label word cannot be spelled by the tokenizer, or template and
    options leave fewer than ``MIN_TEXT_TOKENS`` to the text.
    """

    def __init__(self, card: TaskCard, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.card, self.tokenizer, self.max_tokens = card, tokenizer, max_tokens
        self._encode = lru_cache(maxsize=1024)(tokenizer.encode)
        self._parts = [(self._ids(literal), name) for literal, name in card.parts]
        self._separator, self._closing = self._ids(SEPARATOR), self._ids(CLOSING)
        self._n_template = 2 + sum(len(literal) for literal, _ in self._parts)
        self._words: list[list[int]] = []
        if card.type == "classification":
            self._words = label_words(card, tokenizer)
            self._index_of_label = {label: index for index, label in enumerate(card.labels)}
        self._n_fixed = self._n_template + self._n_option_tokens(self._words)
        if max_tokens - self._n_fixed < MIN_TEXT_TOKENS:
            what = (
                f"its template and {len(self._words)} options take" if self._words else "its template takes"
            )
            raise UsageError(
                f"task '{card.task}' does not fit {max_tokens} tokens: {what} {self._n_fixed}, and the text "
                f"needs at least {MIN_TEXT_TOKENS}; allow {self._n_fixed + MIN_TEXT_TOKENS} tokens or more, "
                "or shorten the label words in the card"
            )

    def training_input(
        self, example: Example, index: int, *, order: Sequence[int] | None = None, rotation: int = 0
    ) -> MrcInput:
        """Return the one sequence to train on: for extraction the window that best holds the first answer.

        ``order`` writes the options in another order (``order[i]`` is the option at place i); with
        ``rotation`` r the gold span is the option r places after the right one, around the end.
        """
        if self.card.type != "extraction":
            return self._with_options(example, index, order, rotation)
        fields, context, spans = self._windows(example)
        target = token_span(example.answers[0], context.offsets) if example.answers else None
        if target is None:
            return self._window_input(index, fields, context, spans[0], None)
        window = max(spans, key=lambda w: hold(w, target))
        clipped = max(target[0], window[0]), min(target[1], window[1] - 1)
        return self._window_input(index, fields, context, window, clipped)

    def training_inputs(self, example: Example, index: int) -> list[MrcInput]:
        """Return the sequences to train on: one, see `training_input`."""
        return [self.training_input(example, index)]

    def inputs(self, example: Example, index: int) -> list[MrcInput]:
        """Return the sequences to predict on: every window of an extraction context, else one."""
        if self.card.type != "extraction":
            return [self._with_options(example, index)]
        fields, context, spans = self._windows(example)
        targets = [target for answer in example.answers if (target := token_span(answer, context.offsets))]
        made = []
        for window in spans:
            inside = [t for t in targets if window[0] <= t[0] and t[1] < window[1]]
            made.append(self._window_input(index, fields, context, window, inside[0] if inside else None))
        return made

    def fits(self, example: Example) -> bool:
        """Tell whether an example can be formatted: long multiple-choice options may leave no room."""
        if self.card.type != "multiple_choice":
            return True
        return self._room(example, [self._ids(option) for option in example.options]) is not None

    @property
    def n_fixed_tokens(self) -> int:
        """Tokens that every example has: [CLS], [SEP], the template and the label words."""
        return self._n_fixed

    def _ids(self, text: str) -> list[int]:
        return self._encode(text).ids if text else []

    def _head(self, text: str, room: int) -> list[int]:
        """Return the ids of a text, or of a beginning with at least ``room`` tokens: articles are long.

        The beginning stops before a Chinese character, so that its tokens are those of the whole text: such a
        character is always a word of its own.
        """
        limit = room + room // 4
        if room > 0 and len(text) > limit + 100:
            stop = next((i for i in range(limit, limit + 100) if "\u4e00" <= text[i] <= "\u9fff"), None)
            if stop is not None and len(ids := self._ids(text[:stop])) >= room:
                return ids
        return self._ids(text)

    def _n_option_tokens(self, options: Sequence[list[int]]) -> int:
        if not options:
            return 0
        between = len(self._separator) * (len(options) - 1) + len(self._closing)
        return between + sum(len(option) for option in options)

    def _room(self, example: Example, options: Sequence[list[int]]) -> int | None:
        """Return the tokens left for the text fields, None if the options leave too few."""
        room = self.max_tokens - self._n_template - self._n_option_tokens(options)
        if room >= MIN_TEXT_TOKENS or room >= sum(len(self._ids(text)) for text in example.fields.values()):
            return room
        return None

    def _with_options(
        self, example: Example, index: int, order: Sequence[int] | None = None, rotation: int = 0
    ) -> MrcInput:
        if self.card.type == "classification":
            options, room = self._words, self.max_tokens - self._n_fixed
            gold = self._index_of_label[str(example.label)] if example.label is not None else None
        else:
            options = [self._ids(option) for option in example.options]
            room_or_none = self._room(example, options)
            if room_or_none is None:
                taken = self._n_template + self._n_option_tokens(options)
                raise UsageError(
                    f"task '{self.card.task}', line {example.source_line}: template and options take {taken} "
                    f"of {self.max_tokens} tokens and leave no room for the text; allow more tokens"
                )
            room = room_or_none
            gold = int(example.label) if example.label is not None else None
        if order is not None:
            options = [options[i] for i in order]
            gold = list(order).index(gold) if gold is not None else None
        if gold is not None:
            gold = (gold + rotation) % len(options)
        fields = {name: self._head(text, room) for name, text in example.fields.items()}
        caps = fair_lengths([len(ids) for ids in fields.values()], room)
        cut = {name: ids[:cap] for (name, ids), cap in zip(fields.items(), caps, strict=True)}
        ids, _, spans = self._assemble(cut, options)
        start, end = spans[gold] if gold is not None else (0, 0)
        return MrcInput(
            example=index,
            input_ids=np.array(ids, np.int64),
            start=start,
            end=end,
            option_spans=np.array(spans, np.int64).reshape(-1, 2),
            label=-1 if gold is None else gold,
        )

    def _assemble(
        self, fields: Mapping[str, Sequence[int]], options: Sequence[list[int]]
    ) -> tuple[list[int], int, list[tuple[int, int]]]:
        """Return the ids, the position of the context's first token (0: none) and the options' spans."""
        ids = [self.tokenizer.cls_id]
        context_at, spans = 0, []
        for literal, name in self._parts:
            ids += literal
            if name == "options":
                for number, option in enumerate(options):
                    if number:
                        ids += self._separator
                    # an option that the tokenizer drops altogether points at the token that follows it
                    spans.append((len(ids), max(len(ids), len(ids) + len(option) - 1)))
                    ids += option
                ids += self._closing
            elif name is not None:
                if name == "context":
                    context_at = len(ids)
                ids += fields[name]
        ids.append(self.tokenizer.sep_id)
        return ids, context_at, spans

    def _windows(self, example: Example) -> tuple[dict[str, list[int]], Pieces, list[tuple[int, int]]]:
        """Return the fields beside the context (cut to half of the room), the context, and its windows."""
        room = self.max_tokens - self._n_template
        ids = {name: self._ids(text) for name, text in example.fields.items() if name != "context"}
        caps = fair_lengths([len(field) for field in ids.values()], room // 2)
        fields = {name: field[:cap] for (name, field), cap in zip(ids.items(), caps, strict=True)}
        context = self._encode(example.fields["context"])
        size = room - sum(map(len, fields.values()))
        return fields, context, windows(len(context.ids), size, self.card.max_answer_tokens)

    def _window_input(
        self,
        index: int,
        fields: Mapping[str, Sequence[int]],
        context: Pieces,
        window: tuple[int, int],
        target: tuple[int, int] | None,
    ) -> MrcInput:
        first, last = window
        ids, at, _ = self._assemble({**fields, "context": context.ids[first:last]}, ())
        return MrcInput(
            example=index,
            input_ids=np.array(ids, np.int64),
            start=at + target[0] - first if target else 0,
            end=at + target[1] - first if target else 0,
            option_spans=np.empty((0, 2), np.int64),
            context_span=(at, at + last - first - 1) if last > first else None,
            context_offsets=context.offsets[first:last],
        )


def label_words(card: TaskCard, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of each label's word, in the card's order.

    Raises ``UsageError`` naming the words that the vocabulary cannot spell, or two that are the same tokens.
    """
    words = [list(tokenizer.encode(word).ids) for word in card.labels.values()]
    unspelled = [
        f"'{word}' ({label})"
        for (label, word), ids in zip(card.labels.items(), words, strict=True)
        if not ids or tokenizer.unk_id in ids
    ]
    if unspelled:
        raise UsageError(
            f"task '{card.task}': the tokenizer cannot spell the label words "
            f"{', '.join(unspelled)}; choose words of its vocabulary in {card.path.name}"
        )
    same: dict[tuple[int, ...], str] = {}
    for word, ids in zip(card.labels.values(), words, strict=True):
        if (other := same.setdefault(tuple(ids), word)) != word:
            raise UsageError(
                f"task '{card.task}': words '{word}' and '{other}' are the same tokens; change one"
            )
    return words


def filled_template(card: TaskCard, example: Example) -> str:
    """Return an example's template filled in, as uncut text without [CLS] and [SEP]."""
    words = list(card.labels.values()) if card.type == "classification" else example.options
    filled = {**example.fields, "options": SEPARATOR.join(words) + CLOSING}
    return "".join(literal + (filled[name] if name else "") for literal, name in card.parts)


def fair_lengths(lengths: Sequence[int], room: int) -> list[int]:
    """Return how much of each length is kept so that they fit ``room``: the longest are cut first, to one
    cap.

    Those under the cap stay whole; what rounding leaves over goes to the first of those that are cut.
    """
    kept = list(lengths)
    left = max(room, 0)
    open_ = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    while open_ and lengths[open_[0]] * len(open_) <= left:
        left -= lengths[open_.pop(0)]
    if open_:
        cap, extra = divmod(left, len(open_))
        for rank, i in enumerate(sorted(open_)):
            kept[i] = min(lengths[i], cap + (rank < extra))
    return kept


def windows(n_tokens: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Return the [first, last) windows of ``size`` that cover ``n_tokens`` and overlap by ``overlap`` or
    more.

    The overlap is at most half of a window, so that there is always progress; the last window ends at the
    end.
    """
    if n_tokens <= size:
        return [(0, n_tokens)]
    step = size - min(overlap, size // 2)
    starts = [*range(0, n_tokens - size, step), n_tokens - size]
    return [(start, start + size) for start in starts]


def token_span(answer: Answer, offsets: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the first and last token that overlap an answer; None if no token does (dropped characters)."""
    end = answer.start + len(answer.text)
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > answer.start]
    return (inside[0], inside[-1]) if inside else None


def hold(window: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return how well a window holds a target: tokens held, then tokens on the scarcer side of it."""
    held = min(target[1], window[1] - 1) - max(target[0], window[0]) + 1
    return held, min(target[0] - window[0], window[1] - 1 - target[1])

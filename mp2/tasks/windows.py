"""Where a text is longer than the room for it: what is cut, and windows that slide over a context."""

from __future__ import annotations

from collections.abc import Sequence

from mp2.tasks.example import Answer


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

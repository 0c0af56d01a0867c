"""Results that a device is still computing.

Whoever starts work and whoever waits for it need not be the same: several runs share a GPU by having their
evaluations launched one after another, without waiting, and each waits for its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Pending(Generic[T]):
    """Work under way on a device."""

    fetch: Callable[[], T]
    """Wait for it and return what it found; once, from any thread."""


def then(result: T | Pending[T], change: Callable[[T], U]) -> U | Pending[U]:
    """Return ``change`` of the result: now, or when it is fetched, in the thread that fetches it."""
    if isinstance(result, Pending):
        return Pending(lambda: change(result.fetch()))
    return change(result)


def settled(result: T | Pending[T]) -> T:
    """Return the result, after waiting for it where it is pending."""
    return result.fetch() if isinstance(result, Pending) else result

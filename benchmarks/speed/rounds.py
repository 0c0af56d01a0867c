"""What the rounds of a measurement say together, and how those that are done are kept.

One round is one sample: on a shared machine the same point has differed by 30 % within a run. So every speed
is a median with its least and most, ratios are taken within a round (whose two sides alternate), and a target
counts as met only where every round is above it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.provenance import SOURCE_SHA256, processor
from mp2.errors import UsageError

LEAST_ROUNDS = 3


def spread(values: Sequence[float], digits: int) -> dict[str, Any]:
    """Return median, least, most and the ``values`` themselves, one a round, to ``digits`` decimals."""
    found = {"median": median(values), "min": min(values), "max": max(values)}
    return {
        **{name: round(x, digits) for name, x in found.items()},
        "rounds": [round(x, digits) for x in values],
    }


def ranged(found: dict[str, Any], digits: int) -> str:
    """Return a `spread` as ``median (least-most)``."""
    median, least, most = (f"{found[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({least}-{most})"


def verdict(values: Sequence[float], target: float) -> str:
    """Return ``met`` where every value is above ``target``, ``missed`` where none is, else ``not shown``."""
    if min(values) > target:
        return "met"
    return "missed" if max(values) <= target else "not shown"


def check_rounds(n_rounds: int) -> None:
    """Refuse what shows no range; UsageError."""
    if n_rounds < LEAST_ROUNDS:
        raise UsageError(f"--rounds is {n_rounds}, expected at least {LEAST_ROUNDS}: fewer show no range")


class Pieces:
    """A measurement's records, a JSON file each, so that it can be cut off and go on.

    Taken up again only where code, machine and settings are the same. None is begun when ``minutes`` are
    over; ``n_left`` counts those.
    """

    def __init__(self, folder: Path, settings: Sequence[Any], minutes: float) -> None:
        """Keep records in ``folder``, under a hash of ``settings`` (JSON values)."""
        folder.mkdir(parents=True, exist_ok=True)
        same = [SOURCE_SHA256, processor(), torch.__version__, torch.get_num_threads(), *settings]
        self._prefix = folder / hashlib.sha256(json.dumps(same).encode()).hexdigest()[:8]
        self._end = time.perf_counter() + 60 * minutes
        self.n_left = 0

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Return the record ``name``, made now if there is time and it is not kept; else None."""
        file = self._prefix.with_name(f"{self._prefix.name}-{name}.json")
        if not file.is_file():
            if time.perf_counter() > self._end:
                self.n_left += 1
                return None
            record = {**make(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
            new = file.with_suffix(".new")
            new.write_text(json.dumps(record) + "\n", "utf-8")
            new.replace(file)
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return found

"""How far a table or figure is, in words: the scale of its cells, which are missing, which failed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Cell, cell_file, failures, read_cells
from mp2.errors import Mp2Error, UsageError

SCALE = (  # setting, what it is of, the paper's
    ("iters", "iterations of black-box tuning", "8,000"),
    ("epochs", "epochs of gradient tuning", "1,000"),
    ("test_limit", "test examples at most", "all of them"),
)


def scale_of(settings: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """One sentence: what these cells had, and what the paper's had."""
    parts = [f"{settings[name]:,} {what} (paper: {paper})" for name, what, paper in SCALE]
    numbers = ", ".join(map(str, sorted(set(seeds))))
    return (
        f"Scale: {'; '.join(parts)}; {'seed' if len(set(seeds)) == 1 else 'seeds'} {numbers} (paper: five); "
        f"at most {settings['max_tokens']} tokens; backbone {Path(settings['backbone']).name} (paper: "
        "CPT-large, 24 layers x 1024)."
    )


def stored_settings(work: Path) -> dict[str, Any]:
    """What the cells of a work folder share.

    Raises:
        UsageError: the folder has no settings.
    """
    try:
        settings: dict[str, Any] = json.loads((work / "settings.json").read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no settings.json in {work}, which has the cells' settings") from None
    return settings


def read_settings(work: Path) -> dict[str, Any]:
    """`stored_settings` with names in place of this machine's folders."""
    settings = stored_settings(work)
    settings["backbone"] = Path(settings["backbone"]).name
    settings["prompts"] = [Path(name).name for name in settings["prompts"]]
    return settings


def state_of(work: Path, asked: Sequence[Cell], notes: Sequence[str] = ()) -> list[str]:
    """Lines for the page of a work folder: its scale, ``notes``, which cells of ``asked`` are not there."""
    scale = scale_of(read_settings(work), [int(cell["seed"]) for cell in read_cells(work)])
    return [scale, *notes, *missing_words(work, asked), *failed_words(work, asked)]


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def missing_of(work: Path, cells: Sequence[Cell]) -> dict[str, dict[str, list[str]]]:
    """Method -> seed -> tasks of the cells that were asked for and are not there (with their shots)."""
    found: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        if not cell_file(work, cell).exists():
            task = Path(cell.task).stem + ("" if cell.shots is None else f" ({cell.shots} shots)")
            found.setdefault(cell.method, {}).setdefault(str(cell.seed), []).append(task)
    return found


def missing_words(work: Path, cells: Sequence[Cell]) -> list[str]:
    """Lines for the page: none where everything that was asked for is there."""
    missing = missing_of(work, cells)
    if not missing:
        return []
    asked: dict[tuple[str, str], int] = {}
    for cell in cells:
        key = cell.method, str(cell.seed)
        asked[key] = asked.get(key, 0) + 1
    same: dict[str, list[str]] = {}  # what is missing -> methods
    for method, by_seed in missing.items():
        tasks: dict[str, list[str]] = {}  # tasks -> seeds
        for seed, own in by_seed.items():
            text = "all tasks" if len(own) == asked[method, seed] > 1 else ", ".join(own)
            tasks.setdefault(text, []).append(seed)
        words = [
            f"{text} (seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)})"
            for text, seeds in tasks.items()
        ]
        same.setdefault("; ".join(words), []).append(method)
    n = sum(len(own) for by_seed in missing.values() for own in by_seed.values())
    lines = [f"Missing: {n} of {len(cells)} cells; the same command computes them."]
    lines += [f"- {', '.join(methods)}: {words}" for words, methods in same.items()]
    return lines


def failed_words(work: Path, cells: Sequence[Cell]) -> list[str]:
    """Lines for the page: a line a cell that failed when it was last tried."""
    failed = failures(work, cells)
    if not failed:
        return []
    return [f"Failed: {len(failed)} of {len(cells)} cells.", *(f"- {n}: {why}" for n, why in failed.items())]


def check_failed(folders: Mapping[Path, Sequence[Cell]]) -> None:
    """Raise ``Mp2Error`` (exit 1) if cells failed, once the page with the others is written."""
    n = sum(len(failures(work, cells)) for work, cells in folders.items())
    if n:
        where = ", ".join(str(work / "failed") for work, cells in folders.items() if failures(work, cells))
        raise Mp2Error(
            f"{n} of {sum(map(len, folders.values()))} cells failed, the others are in the page: {where} has "
            "their errors; the same command tries them again"
        )


def nothing_yet(
    folders: Mapping[Path, Sequence[Cell]], cells: Sequence[Mapping[str, Any]], until: float
) -> bool:
    """Say that a time limit ended before any of the cells that were asked for, and return True.

    For commands that have nothing to show.

    ``cells`` are those that are finished, none of which has what is to be shown.

    Raises:
        Mp2Error: cells failed.
        UsageError: otherwise none is there, or none could be run.
    """
    check_failed(folders)
    where = ", ".join(str(work) for work in folders)
    refused = next((cell["refused"] for cell in cells if "refused" in cell), None)
    if refused is not None:
        raise UsageError(f"none of the {len(cells)} cells in {where} was run: {refused}")
    if cells:
        raise UsageError(f"none of the {len(cells)} cells in {where} has scores on a dev set to draw")
    if until == math.inf:
        raise UsageError(f"there are no cells in {where} yet")
    say("no cell was begun within --budget-minutes: there is nothing to show yet")
    return True

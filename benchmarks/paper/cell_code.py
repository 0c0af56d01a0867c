"""Which code the cells of a table came from: cells are computed at different times, perhaps by other code."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

Cell = dict[str, Any]


def code_name(provenance: dict[str, Any]) -> str:
    """Return the commit, whether its tree had changes, and the hash of the package's sources where known."""
    commit, source = provenance.get("commit"), provenance.get("source_sha256")
    changed = " with changes" if commit and provenance.get("dirty") else ""
    if not commit and not source:
        return "unknown code"
    names = [f"{commit}{changed}" if commit else "no commit", f"source {source}" if source else ""]
    return ", ".join(name for name in names if name)


def made_by(cells: Sequence[Cell]) -> dict[str, dict[str, int]]:
    """Return how many cells of each method came from which code, by `code_name`."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for cell in cells:
        found[cell["method"]][code_name(cell["provenance"])] += 1
    return {method: dict(counts.most_common()) for method, counts in found.items()}


def codes(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Return all that is known of each code, by `code_name`: its cells, their time, commands and versions."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        found[code_name(cell["provenance"])].append(cell["provenance"])
    return {name: {"cells": len(own), **_together(own)} for name, own in found.items()}


def _together(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return every field as the sorted list of its values, times as first and last."""
    fields = dict.fromkeys(name for one in found for name in one if name != "sgemm_gflops")
    values = {name: sorted({one[name] for one in found if one.get(name) is not None}) for name in fields}
    return {name: [own[0], own[-1]] if name == "time" and own else own for name, own in values.items()}


def mixed(cells: Sequence[Cell]) -> list[str]:
    """Return the methods whose cells came from different code.

    Sources with the same hash are the same code, whatever the commit; without hashes commits are compared,
    and a tree with changes is another code than its commit.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for cell in cells:
        where_from = cell["provenance"]
        found[cell["method"]].add(where_from.get("source_sha256") or code_name(where_from))
    return [method for method, sources in found.items() if len(sources) > 1]


def code_line(cells: Sequence[Cell]) -> str:
    """Return one line that says what made the cells, and which methods' cells differ in code."""
    methods: dict[tuple[tuple[str, int], ...], list[str]] = defaultdict(list)
    for method, counts in made_by(cells).items():
        methods[tuple(counts.items())].append(method)
    parts = []
    for counts, names in methods.items():
        each = " each" if len(names) > 1 else ""
        parts.append(f"{', '.join(names)}: " + " + ".join(f"{code} ({n} cells{each})" for code, n in counts))
    differing = mixed(cells)
    end = f"; NOT the same code within {', '.join(differing)}" if differing else ""
    return f"Code of the cells: {'; '.join(parts)}{end}."

"""Where every card's data come from, as a table: for ``mp2 tasks sources`` and docs/sources.md."""

from __future__ import annotations

from mp2.tasks.card import Source, TaskCard, list_cards

HEAD = ("task", "track", "source", "format", "licence", "confirmed", "tested with", "note")


def source_rows() -> list[dict[str, str]]:
    """Return a record for each card of the package, in the order of HEAD."""
    return [dict(zip(HEAD, _row(card), strict=True)) for card in list_cards()]


def _row(card: TaskCard) -> tuple[str, ...]:
    source = card.source
    if card.task.startswith("demo_"):
        return (card.task, "demo", "in the package", "JSON lines", "Apache-2.0", "yes", "itself", "")
    if source is None:
        return (card.task, card.track, "none", "-", "-", "-", "-", "")
    where, form, tested = _kind(source)
    confirmed = "yes" if source.confirmed else "no"
    return (
        card.task,
        card.track,
        where,
        form,
        source.licence or "not stated",
        confirmed,
        tested,
        source.note,
    )


def _kind(source: Source) -> tuple[str, str, str]:
    """Return where, in which format, and with what stand-in its way is tested offline."""
    if source.hub:
        name = source.hub + (f" ({source.config})" if source.config else "")
        return f"hub: {name}", "rows of datasets", "a stand-in of the library"
    if source.files:
        address = next(iter(source.files.values())).split()[0]
        ending = address.rpartition(".")[2]
        form = {"lines": f"cells by {source.separator!r}", "squad": "SQuAD", "c3": "C3"}.get(
            source.format, ending
        )
        packed = " in an archive" if "#" in address else ""
        return address.split("#")[0], form + packed, "a local server"
    return f"by hand: {source.page}" if source.page else "none found", "-", "the message"


def markdown() -> str:
    """Return the table as a page."""
    rows = [tuple(row.values()) for row in source_rows()]
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"

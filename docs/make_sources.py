"""Writes docs/sources.md from the task cards: python docs/make_sources.py."""

from __future__ import annotations

from pathlib import Path

HEAD = """# Where the data come from

Made by `python docs/make_sources.py` from the cards; a test keeps it fresh. `mp2 tasks fetch NAME --to DIR`
(or `all`) loads a task's public data, `--data DIR` reads it. Nothing of it ships with the package; licences
are those that the sources state, and yours to keep.

*confirmed*: address and format were found in public code or in an index of the repository's files; none of
them was downloaded for this table. *by hand*: no program can fetch it; the page says where people get it.
The paper's tasks have the tracks `upstream`, `unseen_data` and `unseen_task`.

"""


def page() -> str:
    """The page's text."""
    from mp2.tasks.show import sources_page

    return HEAD + sources_page()


if __name__ == "__main__":
    (Path(__file__).parent / "sources.md").write_text(page(), "utf-8")

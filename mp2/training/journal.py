"""The loss journals of training runs: one JSON line a step, cut back to the checkpoint on resume."""

from __future__ import annotations

from pathlib import Path


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the first ``step`` lines (later steps are taken again) and drop a torn last line."""
    if path.is_file():
        lines = path.read_text().split("\n")[:-1][:step]
        path.write_text("".join(line + "\n" for line in lines))

"""The paper's tables and figures, each one command.

    python -m benchmarks.paper table3|table4|table5|figure3|figure4a|figure4b|figure5|steering [OPTION ...]

``--help`` after a name says what it shows and takes. All of them but table4 and figure5 compute cells: one
JSON file each, resumable, on one core, several (``--jobs``) or a Ray cluster (``--ray ADDRESS``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from benchmarks.command import one_line_errors
from mp2.errors import UnknownNameError, UsageError

COMMANDS = {
    "table3": ("benchmarks.paper.table3", "run"),
    "table4": ("benchmarks.speed.table4", "run"),
    "table5": ("benchmarks.paper.table5", "run"),
    "figure3": ("benchmarks.paper.figure3", "run"),
    "figure4a": ("benchmarks.paper.figure4", "run_a"),
    "figure4b": ("benchmarks.paper.figure4", "run_b"),
    "figure5": ("benchmarks.paper.figure5", "run"),
    "steering": ("benchmarks.paper.steering", "run"),
}


@one_line_errors(goes_on=True)
def main() -> None:
    """Run the table or figure that was named."""
    run(sys.argv[1:])


def run(words: Sequence[str]) -> None:
    """See `main`; errors are raised."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        if not words:
            raise UsageError(f"no table or figure was named, expected one of {', '.join(COMMANDS)}")
        return
    if words[0] not in COMMANDS:
        raise UnknownNameError("table or figure", words[0], COMMANDS)
    module, function = COMMANDS[words[0]]
    named: Callable[[Sequence[str]], None] = getattr(import_module(module), function)
    named(words[1:])


if __name__ == "__main__":
    main()

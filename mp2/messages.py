"""Lines for people, of 400 characters at most, and with nothing in them that a terminal would obey."""

from __future__ import annotations

import re
import sys
import warnings

LONGEST_LINE = 400  # characters; a label, a path or a name in a message can have thousands
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """The text with control characters, which could do anything to a terminal, as escapes."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def shortened(text: str) -> str:
    """Printable text; the middle of a line of more than 400 characters is left out."""
    text = printable(text)
    return "\n".join(
        line if len(line) <= LONGEST_LINE else f"{line[:250]} ... {line[-LONGEST_LINE + 255 :]}"
        for line in text.split("\n")
    )


def say(line: str) -> None:
    """Print a line of the log on stderr."""
    print(shortened(f"mp2: {line}"), file=sys.stderr, flush=True)


def warnings_are_lines() -> None:
    """From now on a Python warning is printed as one line, like what ``say`` says."""

    def line_of(message: object, *_: object, **__: object) -> str:
        return shortened(f"mp2: warning: {' '.join(str(message).split())}") + "\n"

    warnings.formatwarning = line_of

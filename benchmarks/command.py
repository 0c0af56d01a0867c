"""How a benchmark ends where something is wrong: one line and the exit status, as the command line does."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from mp2.errors import Mp2Error

Main = Callable[[], None]


def one_line_errors(*, goes_on: bool = False) -> Callable[[Main], Main]:
    """Decorate a ``main``: ``Mp2Error`` becomes one line and its own exit status, Ctrl-C 130.

    ``goes_on``: what is done is kept, and the same command does what is left.
    """
    after_stop = "stopped; the same command goes on from here" if goes_on else "stopped"

    def decorate(main: Main) -> Main:
        file = Path(inspect.getfile(main))
        name = file.parent.name if file.stem == "__main__" else file.stem

        @wraps(main)
        def command() -> None:
            try:
                main()
            except Mp2Error as error:
                print(f"{name}: {error}", file=sys.stderr)
                sys.exit(error.exit_code)
            except KeyboardInterrupt:
                print(f"{name}: {after_stop}", file=sys.stderr)
                sys.exit(130)

        return command

    return decorate

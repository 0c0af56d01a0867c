"""The command line: every command parses, calls one function and prints; no logic lives here.

Exit status: 0 done, 1 the work failed, 2 the command was typed wrong or its input is bad.
Results go to stdout (``--json`` for machines), progress and log to stderr.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from mp2 import __version__, environment
from mp2.commands.baselines import baselines
from mp2.commands.bbt import bbt
from mp2.commands.compare import compare
from mp2.commands.doctor import doctor
from mp2.commands.export import export
from mp2.commands.predict import predict
from mp2.commands.pretrain import pretrain
from mp2.commands.pretrain_backbone import pretrain_backbone
from mp2.commands.printing import note, prepare_streams
from mp2.commands.scratch import scratch
from mp2.commands.serve import serve
from mp2.commands.tasks import tasks
from mp2.commands.tune import tune
from mp2.errors import Mp2Error
from mp2.messages import shortened

# of a file: the machine's doing, for its owner to mend, and no mistake of ours
_MACHINE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EFBIG,
    errno.ENOMEM,
}
_NO_MEMORY = (  # what libraries say, whose errors are of no kind of their own
    "can't start new thread",
    "can't allocate memory",
    "annot allocate memory",
    "failed to map segment",
    "bad_alloc",
    "could not create a primitive",  # oneDNN's words for it
    "could not create a memory",
    "ailed to allocate",
)
_NO_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}  # of a name that was typed


def _forget_output(error: OSError) -> None:
    """Let Python not try again at exit what a stream has just refused, with a message of its own."""
    if error.filename is None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _shortened_errors() -> Iterator[None]:
    """Click's own errors, shortened: an option or a name that was typed can be of any length."""
    try:
        yield
    except click.UsageError as error:
        text = shortened(f"Error: {error.format_message()}").removeprefix("Error: ")
        if text == error.format_message():
            raise
        raise click.UsageError(text, error.ctx) from error


class _Group(click.Group):
    """A group that prints ``Mp2Error`` as one message and exits with its own status; with 130 on Ctrl-C."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of their use, not of the alphabet."""
        return list(self.commands)

    def main(self, *args: Any, **settings: Any) -> Any:
        """As click's, with streams that can spell everything."""
        prepare_streams()
        return super().main(*args, **settings)

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        """As click's; a wrong option before the command's name is answered as one after it."""
        with _shortened_errors():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: click.Context) -> object:
        environment.prepare()
        try:
            with _shortened_errors():
                return super().invoke(ctx)
        except Mp2Error as error:
            note(f"mp2: {error}")
            sys.exit(error.exit_code)
        except OSError as error:
            if error.errno not in (*_MACHINE, *_NO_PATH):
                raise
            where = "standard output" if error.filename is None else os.fsdecode(error.filename)
            note(f"mp2: {where}: {error.strerror}")
            _forget_output(error)
            sys.exit(1 if error.errno in _MACHINE else 2)
        except KeyboardInterrupt:
            note("mp2: stopped")
            sys.exit(130)
        except (MemoryError, RuntimeError, ImportError) as error:
            if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in _NO_MEMORY):
                raise
            said = str(error).strip().splitlines()[:1] or ["no more was given"]
            note(f"mp2: out of memory: {said[0]}; give it more, or ask for less")
            sys.exit(1)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of libraries in Rust: no Exception of Python's
                raise
            note(f"mp2: a library failed: {' '.join(str(error).split())}")
            sys.exit(1)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 the work failed, 2 a wrong command or bad input, 130 stopped by Ctrl-C."
    "\n\n"
    "Names of tasks, backbones, runtimes and searches are completed after: "
    'eval "$(_MP2_COMPLETE=bash_source mp2)" (zsh_source in zsh; in fish: '
    "_MP2_COMPLETE=fish_source mp2 | source).",
)
@click.version_option(__version__, prog_name="mp2")
def main() -> None:
    """Tune a frozen language model for a new task from 32 examples, without gradients."""


for command in (
    tasks,
    bbt,
    predict,
    compare,
    baselines,
    tune,
    pretrain,
    pretrain_backbone,
    scratch,
    export,
    serve,
    doctor,
):
    main.add_command(command)


if __name__ == "__main__":
    main()

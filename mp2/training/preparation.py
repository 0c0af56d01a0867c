"""A training folder as it was, if what was asked for turns out to be wrong while the run is prepared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mp2.errors import UsageError
from mp2.training.checkpoint import LOCK


class Preparation:
    """What a folder holds now, which may be nothing, or no folder at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._missing = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        self._before = set() if self._missing else set(self._folder.iterdir())

    @contextmanager
    def undone(self) -> Iterator[None]:
        """On a ``UsageError``, take out what the block put into the folder, and the folders made for it.

        Enter with the folder's lock held. What another process put there before it was ours stays.
        """
        theirs = {path for path in self._folder.iterdir() if path.name != LOCK}
        keep = self._before | theirs
        try:
            yield
        except UsageError:
            for path in set(self._folder.iterdir()) - keep:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            for folder in [] if theirs else self._missing:  # the deepest first
                folder.rmdir()
            raise

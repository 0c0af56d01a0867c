"""A bundle of ``mp2 export --run``: verified, its tasks and graphs found by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mp2.engine.folder import MANIFEST, check_hashes
from mp2.errors import FormatError, UnknownNameError

BUNDLE_FORMAT = "mp2 bundle"
BUNDLE_SCHEMA_VERSION = 2
_AGAIN = "write the bundle again"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle; what its manifest holds is in docs/engines.md."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and verify ``path``; FormatError names what is missing, damaged or not as expected."""
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            raise FormatError(
                f"no {MANIFEST}: not a bundle, or its export did not finish; make one with "
                f"'mp2 export --run RUN --out {path}'",
                path=path,
            )
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FormatError(f"not JSON ({error}); {_AGAIN}", path=file) from error
        if not isinstance(raw, dict) or raw.get("format") != BUNDLE_FORMAT:
            raise FormatError(
                "not the manifest of a bundle; make one with 'mp2 export --run RUN --out DIR'", path=file
            )
        if raw.get("schema_version") != BUNDLE_SCHEMA_VERSION:
            raise FormatError(
                f"{raw.get('schema_version')!r}, expected {BUNDLE_SCHEMA_VERSION}: written by another mp2; "
                f"{_AGAIN}",
                path=file,
                field="schema_version",
            )
        kinds = {
            "backbone": dict,
            "precision": str,
            "graphs": dict,
            "tasks": dict,
            "limits": dict,
            "files": dict,
        }
        for name, kind in kinds.items():
            if not isinstance(raw.get(name), kind):
                raise FormatError(f"expected {kind.__name__}; {_AGAIN}", path=file, field=name)
        listed = raw["files"]
        needed = [
            *raw["graphs"],
            *(entry[key] for entry in raw["tasks"].values() for key in ("card", "tensors")),
        ]
        for name in needed:
            if name not in listed:
                raise FormatError(f"no entry for '{name}'; {_AGAIN}", path=file, field="files")
        check_hashes(path, listed, _AGAIN)
        return cls(path, raw)

    @property
    def files(self) -> Mapping[str, str]:
        """Name -> SHA-256 of every file."""
        files: Mapping[str, str] = self.manifest["files"]
        return files

    @property
    def precision(self) -> str:
        """The graphs' type."""
        return str(self.manifest["precision"])

    def file(self, name: str) -> Path:
        """Return the path of one of the manifest's files."""
        if name not in self.manifest["files"]:
            raise FormatError(f"'{name}' is not listed; {_AGAIN}", path=self.path / MANIFEST, field="files")
        return self.path / name

    def card(self, task: str) -> dict[str, Any]:
        """Return what a task's JSON file holds; UnknownNameError if there is no such task."""
        if task not in self.manifest["tasks"]:
            raise UnknownNameError("task", task, list(self.manifest["tasks"]), f"These are in {self.path}.")
        card: dict[str, Any] = json.loads(self.file(self.manifest["tasks"][task]["card"]).read_text("utf-8"))
        return card

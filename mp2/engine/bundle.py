"""A bundle of ``mp2 export --run``: verified, its tasks and graphs found by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mp2.engine.folder import BACKBONE_FIELDS, FOLDER_PRECISIONS, MANIFEST, check_hashes
from mp2.errors import FormatError, UnknownNameError, shown
from mp2.json_files import (
    Fields,
    anything,
    check,
    list_of,
    object_of,
    one_of,
    read_object,
    sha256,
    text,
    whole,
)

BUNDLE_FORMAT = "mp2 bundle"
BUNDLE_SCHEMA_VERSION = 2
_AGAIN = "write the bundle again"
_TENSORS = object_of(Fields({"dtype": text, "shape": list_of(anything)}))
_MANIFEST = Fields(
    {
        "backbone": BACKBONE_FIELDS,
        "precision": one_of(*FOLDER_PRECISIONS),
        "graphs": object_of(Fields({"inputs": _TENSORS, "outputs": _TENSORS})),
        "tasks": object_of(
            Fields({"card": text, "tensors": text, "graph": text, "head": text, "prompt_length": whole()})
        ),
        "limits": Fields({"positions": whole(1, 2**31 - 1), "pad_id": whole(0, 2**31 - 1)}),
        "files": object_of(sha256),
    },
    {"opset": whole(1), "versions": object_of(text)},
)


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
            raw = read_object(file)
        except FormatError as error:
            raise FormatError(f"{error}; {_AGAIN}") from error
        if raw.get("format") != BUNDLE_FORMAT:
            raise FormatError(
                "not the manifest of a bundle; make one with 'mp2 export --run RUN --out DIR'", path=file
            )
        if raw.get("schema_version") != BUNDLE_SCHEMA_VERSION:
            raise FormatError(
                f"{shown(raw.get('schema_version'))}, expected {BUNDLE_SCHEMA_VERSION}: written by another "
                f"mp2; {_AGAIN}",
                path=file,
                field="schema_version",
            )
        try:
            check(raw, _MANIFEST, file)
        except FormatError as error:
            raise FormatError(f"{error}; {_AGAIN}") from error
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

    def read(self, name: str) -> bytes:
        """Return what is in one of the manifest's files now; FormatError where that is not what it lists."""
        path = self.file(name)
        data = path.read_bytes()
        got, expected = hashlib.sha256(data).hexdigest(), self.files[name]
        if got != expected:
            raise FormatError(f"sha256 is {got[:12]}, expected {expected[:12]}; {_AGAIN}", path=path)
        return data

    def card(self, task: str) -> dict[str, Any]:
        """Return what a task's JSON file holds; UnknownNameError if there is no such task."""
        if task not in self.manifest["tasks"]:
            raise UnknownNameError("task", task, list(self.manifest["tasks"]), f"These are in {self.path}.")
        return read_object(self.file(self.manifest["tasks"][task]["card"]))

"""The engine folder: a manifest beside graphs and weights, verified before any runtime sees a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mp2.errors import FormatError, MismatchError, shown
from mp2.files import json_bytes
from mp2.json_files import Fields, build, check, object_of, one_line, one_of, read_object, sha256, text, whole
from mp2.text_files import check_file

if TYPE_CHECKING:
    from mp2.backbone import Backbone

MANIFEST = "manifest.json"
SCHEMA_VERSION = 3
MAX_LAYERS = 10_000  # every layer has five files, all named in the manifest
_AGAIN = "export the engine again"
FOLDER_PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
TYPED_PRECISIONS = FOLDER_PRECISIONS[1:]  # of GPUs: the types are in the graphs


@dataclass(frozen=True, kw_only=True)
class BackboneEntry:
    """The backbone that the folder was exported from."""

    name: str
    sha256: str
    n_layers: int
    hidden: int
    n_heads: int
    ffn: int
    vocab_size: int
    activation: str
    token_type: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``manifest.json``: what is in the folder, and what it was made from."""

    schema_version: int
    backbone: BackboneEntry
    max_tokens: int  # prompt rows of inline injection count too
    precision: str
    opset: int
    versions: Mapping[str, str]
    files: Mapping[str, str]  # name -> sha256

    def to_json(self) -> str:
        """Return the file's text."""
        return json_bytes(asdict(self), indent=2, sort_keys=True).decode() + "\n"


def layer_file(index: int, suffix: str) -> str:
    """Return the name of layer ``index``'s file, ``layer_07.onnx``."""
    return f"layer_{index:02d}.{suffix}"


def plain_layer_file(index: int) -> str:
    """Return the name of layer ``index``'s graph without prefix inputs, ``layer_07_plain.onnx``."""
    return f"layer_{index:02d}_plain.onnx"


def needed_files(n_layers: int) -> list[str]:
    """Return the names of the graphs and weights that every engine folder has."""
    layers = [name for i in range(n_layers) for name in (layer_file(i, "onnx"), plain_layer_file(i))]
    weights = ["embed.bin", *(layer_file(i, "bin") for i in range(n_layers))]
    return ["embed.onnx", "embed_inline.onnx", *layers, "head.onnx", *weights]


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class EngineFolder:
    """A verified engine folder."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, backbone: Backbone | None = None) -> EngineFolder:
        """Read and verify ``path``: the manifest's form, every file's hash, the backbone it was made from.

        Raises FormatError for a folder that is incomplete or damaged, MismatchError for another backbone's.
        """
        folder = cls(Path(path), read_manifest(Path(path) / MANIFEST))
        if backbone is not None:
            folder._check_backbone(backbone)
        folder._check_files()
        return folder

    def file(self, name: str) -> Path:
        """Return the path of one of the manifest's files."""
        if name not in self.manifest.files:
            raise FormatError(
                f"'{name}' is not listed; export the engine again", path=self._at, field="files"
            )
        return self.path / name

    def read(self, name: str) -> bytes:
        """Return what is in one of the manifest's files now; FormatError where that is not what it lists."""
        path = self.file(name)
        data = path.read_bytes()
        got, expected = hashlib.sha256(data).hexdigest(), self.manifest.files[name]
        if got != expected:
            raise FormatError(f"sha256 is {got[:12]}, expected {expected[:12]}; {_AGAIN}", path=path)
        return data

    @property
    def files(self) -> Mapping[str, str]:
        """Name -> SHA-256 of every file."""
        return self.manifest.files

    @property
    def precision(self) -> str:
        """The graphs' type."""
        return self.manifest.precision

    @property
    def _at(self) -> Path:
        return self.path / MANIFEST

    def _check_backbone(self, backbone: Backbone) -> None:
        entry = self.manifest.backbone
        if entry.sha256 != backbone.sha256:
            raise MismatchError(
                f"engine folder {self.path} was exported from backbone '{entry.name}' "
                f"(weights {entry.sha256[:12]}), expected '{backbone.config.name}' "
                f"(weights {backbone.sha256[:12]}); "
                f"run 'mp2 export --backbone {backbone.config.name} --out {self.path}' "
                "or pass the folder that fits"
            )
        config = backbone.config
        for name in ("n_layers", "hidden", "n_heads", "ffn", "vocab_size", "activation", "token_type"):
            if (said := getattr(entry, name)) != (wanted := getattr(config, name)):
                raise FormatError(
                    f"is {shown(said)}, expected {wanted!r} of these weights; {_AGAIN}",
                    path=self._at,
                    field=f"backbone.{name}",
                )
        if self.manifest.max_tokens > config.max_positions:
            raise FormatError(
                f"is {self.manifest.max_tokens}, expected at most {config.max_positions}; {_AGAIN}",
                path=self._at,
                field="max_tokens",
            )

    def _check_files(self) -> None:
        again = "the folder is damaged or incomplete: export the engine again"
        for name in needed_files(self.manifest.backbone.n_layers):
            if name not in self.manifest.files:
                raise FormatError(
                    f"no entry for '{name}', which an engine needs; {again}", path=self._at, field="files"
                )
        check_hashes(self.path, self.manifest.files, again)


def check_hashes(folder: Path, files: Mapping[str, str], again: str) -> None:
    """Raise FormatError, ending in ``again``, unless all of ``files`` are in ``folder`` with their hashes."""
    at = folder / MANIFEST
    for name, expected in files.items():
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts or not parts or "/".join(parts) != name:
            raise FormatError(f"'{name}' is not a plain file name; {again}", path=at, field="files")
        file = folder / name
        if not file.is_file():
            raise FormatError(f"'{name}' is listed but missing; {again}", path=at, field="files")
        got = file_sha256(file)
        if got != expected:
            check_file(file)  # a git-lfs pointer is named as such
            raise FormatError(f"sha256 is {got[:12]}, expected {expected[:12]}; {again}", path=file)


def looks_exported(folder: Path) -> bool:
    """Tell whether ``folder`` has an engine's manifest, of any version (not just any ``manifest.json``)."""
    try:
        raw = read_object(folder / MANIFEST)
    except (OSError, FormatError):
        return False
    return {"schema_version", "backbone", "files"} <= raw.keys()


def read_manifest(path: Path) -> Manifest:
    """Return the manifest at ``path``; FormatError names the field that is not as expected."""
    if not path.is_file():
        raise FormatError(
            f"no {MANIFEST}: not an engine folder, or its export did not finish; "
            f"make one with 'mp2 export --backbone NAME --out {path.parent}'",
            path=path.parent,
        )
    raw = _read_object(path)
    if raw.get("format") == "mp2 bundle":
        raise FormatError(
            "a bundle of 'mp2 export --run', expected an engine folder; make one with "
            "'mp2 export --backbone NAME --out DIR'",
            path=path.parent,
        )
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise FormatError(
            f"{shown(version)}, expected {SCHEMA_VERSION}: written by another mp2; {_AGAIN}",
            path=path,
            field="schema_version",
        )
    try:
        check(raw, _MANIFEST, path)
        return build(Manifest, {name: raw[name] for name in Manifest.__annotations__}, path)
    except FormatError as error:
        raise FormatError(f"{error}; {_AGAIN}") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FormatError as error:
        raise FormatError(f"{error}; {_AGAIN}") from error


_SIZE = whole(1, 2**31 - 1)
BACKBONE_FIELDS = Fields(
    {
        "name": one_line,
        "sha256": sha256,
        "n_layers": whole(1, MAX_LAYERS),
        **dict.fromkeys(("hidden", "n_heads", "ffn", "vocab_size"), _SIZE),
        "activation": text,
        "token_type": whole(),
    }
)
_MANIFEST = Fields(
    {
        "backbone": BACKBONE_FIELDS,
        "max_tokens": _SIZE,
        "precision": one_of(*FOLDER_PRECISIONS),
        "opset": whole(1),
        "versions": object_of(text),
        "files": object_of(sha256),
    }
)

"""What a black-box tuning run is: one frozen dataclass a stage, written as ``config.json`` and read back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from mp2.errors import FormatError, UnknownNameError, UsageError
from mp2.limits import check_threads
from mp2.optimizers.config import Kind, LayerConfig, RouterConfig, SearchConfig

RequestedKind = Literal["auto", "deep", "shallow"]
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class BbtConfig(SearchConfig):
    """Everything that `mp2 bbt` needs to run, and to run again: the search, and what it searches."""

    task: str
    data: str | None = None
    backbone: str = "mini"
    prompts: str | None = None  # None: the embedded prompts of the backbone, by kind
    kind: RequestedKind = "auto"  # auto: what the prompt file holds; without one, deep
    shots: int | None = None  # a label; None: the card's
    max_tokens: int | None = None  # None: what the backbone's positions allow
    test: bool = True
    test_limit: int | None = None
    runtime: str = "auto"
    precision: str = "auto"  # fp32 on a CPU, bf16 on a GPU; a run's config.json has the one it took
    device: str = "auto"  # the GPU if there is one
    threads: int | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run can have; names are checked where they are looked up."""
        super().__post_init__()
        if self.kind not in ("auto", "deep", "shallow"):
            raise UnknownNameError("kind of prompts", self.kind, ["auto", "deep", "shallow"])
        check_threads(self.threads)
        for name in ("shots", "max_tokens", "test_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, expected at least 1")
        if self.test_limit is not None and not self.test:
            raise UsageError(
                f"test_limit is {self.test_limit}, and no test set is scored: drop --test-limit or --no-test"
            )

    def method(self, kind: Kind) -> str:
        """What the result calls this run: ``mp2-deep``, ``mp2-shallow-router``, ..."""
        return f"mp2-{kind}" + ("-router" if self.router_only else "")

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any], path: Path | None = None) -> BbtConfig:
        """Read back what :meth:`to_json` wrote; raises ``FormatError`` on fields that it does not know."""
        values = dict(values)
        for name, part in (("router", RouterConfig), ("layers", LayerConfig)):
            values[name] = _build(part, values.get(name, {}), path, f"{name}.")
        config = _build(cls, values, path, "")
        assert isinstance(config, BbtConfig)
        return config

    def sha256(self) -> str:
        """Hash of all fields: two runs with the same hash, data and files give the same result."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _build(cls: type[Any], values: dict[str, Any], path: Path | None, prefix: str) -> Any:
    known = {f.name for f in fields(cls)}
    for name in values:
        if name not in known:
            raise FormatError(
                f"unknown field, expected one of {sorted(known)}", path=path, field=prefix + name
            )
    try:
        return cls(**values)
    except TypeError as error:
        raise FormatError(str(error), path=path) from error

"""What a black-box tuning run is: one frozen dataclass a stage, written as ``config.json`` and read back."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mp2.errors import FormatError, UnknownNameError, UsageError
from mp2.limits import check_seed, check_threads

Kind = Literal["deep", "shallow"]
RequestedKind = Literal["auto", "deep", "shallow"]
SCHEMA_VERSION = 1
MAX_ITERS = 10_000_000  # resuming reads the journal whole, a line of some 300 bytes for each
MAX_POPSIZE = 10_000  # a population is drawn and evaluated at once


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Stage I: the search for the router."""

    method: str = "bits"  # ours; the paper's is "bo" (section 3.4)
    iterations: int | None = None  # None: 200 shallow, 100 deep (appendix A.2); exhaustive: all 2^K

    def __post_init__(self) -> None:
        """Refuse counts that no run can have."""
        if self.iterations is not None and self.iterations < 1:
            raise UsageError(f"router_iters is {self.iterations}, expected at least 1")
        if self.method == "none" and self.iterations is not None:
            raise UsageError("router_iters was given, and router_search is none: there is no stage I")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Stage II: CMA-ES on the fused intrinsic prompts."""

    popsize: int = 20  # appendix A.2
    sigma_shallow: float = 0.1  # appendix A.2
    sigma_input: float = 5e-2  # appendix A.2: the first layer of deep prompts
    sigma_deep: float = 1e-2  # appendix A.2: every other layer
    cma: Literal["full", "diagonal"] = "full"  # the paper's; "diagonal" is cheaper at d = 300

    def __post_init__(self) -> None:
        """Refuse what CMA-ES cannot do."""
        if not 3 <= self.popsize <= MAX_POPSIZE:  # with 2, the library stops at the second generation
            raise UsageError(f"popsize is {self.popsize}, expected 3 to {MAX_POPSIZE:,} (the paper uses 20)")
        for name in ("sigma_shallow", "sigma_input", "sigma_deep"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}, expected a positive step size")
        if self.cma not in ("full", "diagonal"):
            raise UnknownNameError("CMA-ES variant", self.cma, ["full", "diagonal"])

    def sigma(self, layer: int, kind: Kind) -> float:
        """Initial step size of ``layer``."""
        if kind == "shallow":
            return self.sigma_shallow
        return self.sigma_input if layer == 0 else self.sigma_deep


@dataclass(frozen=True, kw_only=True)
class BbtConfig:
    """Everything that `mp2 bbt` needs to run, and to run again."""

    task: str
    data: str | None = None
    backbone: str = "mini"
    prompts: str | None = None  # None: the embedded prompts of the backbone, by kind
    kind: RequestedKind = "auto"  # auto: what the prompt file holds; without one, deep
    iters: int = 8000  # appendix A.2; both stages together
    router_only: bool = False
    router: RouterConfig = field(default_factory=RouterConfig)
    layers: LayerConfig = field(default_factory=LayerConfig)
    seed: int = 8  # the first of the authors' five: 8, 13, 21, 42, 100
    shots: int | None = None  # a label; None: the card's
    dev_every: int | None = None  # None: one round of layer visits (deep), 100 iterations (shallow)
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
        if self.iters < 1:
            raise UsageError(f"iters is {self.iters}, expected at least 1")
        if self.iters > MAX_ITERS:
            raise UsageError(
                f"iters is {self.iters}, expected at most {MAX_ITERS:,}: the journal has a line an iteration"
            )
        if self.kind not in ("auto", "deep", "shallow"):
            raise UnknownNameError("kind of prompts", self.kind, ["auto", "deep", "shallow"])
        if (self.router.iterations or 0) > self.iters:
            raise UsageError(
                f"router_iters is {self.router.iterations}, expected at most {self.iters}: "
                "iters counts both stages together"
            )
        check_seed(self.seed)
        check_threads(self.threads)
        for name in ("shots", "dev_every", "max_tokens", "test_limit"):
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

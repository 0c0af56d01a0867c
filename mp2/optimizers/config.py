"""What is searched how: the settings of both stages, their defaults the paper's (appendix A.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from mp2.errors import UnknownNameError, UsageError
from mp2.limits import check_seed

Kind = Literal["deep", "shallow"]
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
class SearchConfig:
    """Both stages together: all that decides which candidates are tried."""

    iters: int = 8000  # appendix A.2; both stages together
    router_only: bool = False
    router: RouterConfig = field(default_factory=RouterConfig)
    layers: LayerConfig = field(default_factory=LayerConfig)
    seed: int = 8  # the first of the authors' five: 8, 13, 21, 42, 100
    dev_every: int | None = None  # None: one round of layer visits (deep), 100 iterations (shallow)

    def __post_init__(self) -> None:
        """Refuse values that no search can have."""
        if self.iters < 1:
            raise UsageError(f"iters is {self.iters}, expected at least 1")
        if self.iters > MAX_ITERS:
            raise UsageError(
                f"iters is {self.iters}, expected at most {MAX_ITERS:,}: the journal has a line an iteration"
            )
        if (self.router.iterations or 0) > self.iters:
            raise UsageError(
                f"router_iters is {self.router.iterations}, expected at most {self.iters}: "
                "iters counts both stages together"
            )
        check_seed(self.seed)
        if self.dev_every is not None and self.dev_every < 1:
            raise UsageError(f"dev_every is {self.dev_every}, expected at least 1")

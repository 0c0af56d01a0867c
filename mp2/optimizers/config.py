"""What is searched how: the settings of both stages, their defaults the paper's (appendix A.2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mp2.errors import UsageError
from mp2.limits import MAX_SEED
from mp2.options import check, option

Kind = Literal["deep", "shallow"]
MAX_ITERS = 10_000_000  # resuming reads the journal whole, a line of some 300 bytes for each
MAX_POPSIZE = 10_000  # a population is drawn and evaluated at once
_STEP: dict[str, Any] = {"above": 0, "expected": "a positive step size"}


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Stage I: the search for the router."""

    method: str = option(  # ours; the paper's is "bo" (section 3.4)
        "bits",
        "bits, exhaustive, bo, nevergrad:NAME, random or none.",
        flag="router-search",
        kind="router search",
        metavar="METHOD",
    )
    iterations: int | None = option(  # appendix A.2; exhaustive: all 2^K
        None,
        "Iterations of stage I.",
        flag="router-iters",
        default_text="100 deep, 200 shallow",
        at_least=1,
    )

    def __post_init__(self) -> None:
        """Refuse counts that no run can have."""
        check(self)
        if self.method == "none" and self.iterations is not None:
            raise UsageError("router_iters was given, and router_search is none: there is no stage I")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Stage II: CMA-ES on the fused intrinsic prompts."""

    popsize: int = option(  # the code of BBT and MP2; the paper does not say. With 2, pycma stops at once
        20,
        "Population of CMA-ES.",
        at_least=3,
        at_most=MAX_POPSIZE,
        expected=f"3 to {MAX_POPSIZE:,} (the authors' code has 20)",
    )
    cma: Literal["full", "diagonal"] = option(  # the paper's; "diagonal" is cheaper at d = 300
        "full",
        "Covariance: full, or diagonal (cheaper).",
        what="CMA-ES variant",
        choices=("full", "diagonal"),
    )
    keep: Literal["incumbent", "ever"] = option(
        "incumbent",
        "What a layer keeps: the best of the present prompt and its generation, or its best ever (BBTv2).",
        choices=("incumbent", "ever"),
    )
    sigma_input: float = option(5e-2, "First step size, layer 0, deep.", **_STEP)  # appendix A.2
    sigma_deep: float = option(1e-2, "First step size, other layers, deep.", **_STEP)  # appendix A.2
    sigma_shallow: float = option(0.1, "First step size, shallow.", **_STEP)  # appendix A.2

    def __post_init__(self) -> None:
        """Refuse what CMA-ES cannot do."""
        check(self)

    def sigma(self, layer: int, kind: Kind) -> float:
        """Initial step size of ``layer``."""
        if kind == "shallow":
            return self.sigma_shallow
        return self.sigma_input if layer == 0 else self.sigma_deep


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Both stages together: all that decides which candidates are tried."""

    iters: int = option(  # appendix A.2
        8000,
        "Candidates evaluated, both stages together.",
        at_least=1,
        at_most=MAX_ITERS,
        why=": the journal has a line an iteration",
    )
    router: RouterConfig = field(default_factory=RouterConfig)
    router_only: bool = option(False, "Stage I only.")
    layers: LayerConfig = field(default_factory=LayerConfig)
    seed: int = option(  # the first of the authors' five: 8, 13, 21, 42, 100
        8,
        "Draws the few-shot split and drives the search.",
        at_least=0,
        at_most=MAX_SEED,
        expected=f"0 to {MAX_SEED}",
    )
    dev_every: int | None = None  # None: in stage II a round of layers (deep), 100 iterations (shallow)

    def __post_init__(self) -> None:
        """Refuse values that no search can have."""
        check(self)
        if (self.router.iterations or 0) > self.iters:
            raise UsageError(
                f"router_iters is {self.router.iterations}, expected at most {self.iters}: "
                "iters counts both stages together"
            )
        if self.dev_every is not None and self.dev_every < 1:
            raise UsageError(f"dev_every is {self.dev_every}, expected at least 1")

"""Stage II: CMA-ES on the fused intrinsic prompt of each layer, divide and conquer (paper 3.4, A.2).

A layer has one CMA-ES (Hansen and Ostermeier 2001; library ``cma``) on the *offset* from its fused intrinsic
prompt z^(l): mean 0, population 20. Layers are visited in turn, a visit is one generation, and the layer then
keeps the best offset it has found.

Where this differs from BBTv2 (Sun et al. 2022), which it follows otherwise: there, a layer keeps the best
of *all* its own generations (``--keep ever``; their code: ``es.result.xbest``), the first one's even if it is
worse than no prompt, though a loss measured while other layers held older prompts says little about now. Here
(``incumbent``) a generation's best is taken only if it beats the incumbent, whose loss in the present context
is known exactly: the training loss never rises. The CMA-ES update itself needs no such care: it uses
ranks within one generation, which share one context. Its stopping rules are ignored: the budget stops it.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mp2.optimizers.config import LayerConfig

Floats = NDArray[np.float64]


def import_cma() -> Any:
    """The library ``cma``; it imports scipy.stats and matplotlib: a second or two the first time.

    It advises on standard output and by warnings, neither of which are ours to give: the ones are switched
    off by options, the others by a filter for its modules.
    """
    warnings.filterwarnings("ignore", module=r"cma(\..*)?$")  # the same one again changes nothing
    import cma

    return cma


class LayerCma:
    """One layer's CMA-ES over offsets [d]; a pure function of its generator and of what it is told."""

    def __init__(self, n_dims: int, sigma: float, config: LayerConfig, rng: np.random.Generator) -> None:
        options: dict[str, Any] = {
            "popsize": config.popsize,
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": np.nan,  # "do nothing": numpy's global generator is neither seeded nor read
            "verbose": -9,
            "verb_log": 0,
            "verb_disp": 0,
            "signals_filename": None,
            "CMA_diagonal": config.cma == "diagonal",
        }
        library = import_cma()
        with np.errstate(all="ignore"):
            self._es = library.CMAEvolutionStrategy(np.zeros(n_dims), sigma, options)

    def ask(self) -> Floats:
        """The next population of offsets [popsize, d]."""
        with np.errstate(all="ignore"):
            return np.asarray(self._es.ask(), dtype=np.float64)

    def tell(self, offsets: Floats, losses: Floats) -> None:
        """Update from the whole population's losses [popsize]."""
        with np.errstate(all="ignore"):
            self._es.tell(list(offsets), [float(loss) for loss in losses])


def layer_searches(
    sigmas: list[float], n_dims: int, config: LayerConfig, seed: np.random.SeedSequence
) -> list[LayerCma]:
    """A CMA-ES for every layer, each with a random stream of its own."""
    rngs = [np.random.default_rng(child) for child in seed.spawn(len(sigmas))]
    return [LayerCma(n_dims, sigma, config, rng) for sigma, rng in zip(sigmas, rngs, strict=True)]

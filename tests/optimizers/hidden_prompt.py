"""A stand-in for the engine's objective in pure numpy: a hidden router, a chain of layers."""

from __future__ import annotations

import numpy as np

from mp2.optimizers.two_stage import Scores, Space


class HiddenPrompt:
    """Loss = distance of a tanh chain's output from the one that a hidden router and offset give.

    The hidden router is random, not all ones. ``calls`` lists what was asked for.
    """

    def __init__(
        self, seed: int = 0, n_layers: int = 3, n_modules: int = 4, n_dims: int = 6, n_tasks: int = 3
    ):
        rng = np.random.default_rng(seed)
        self.z = rng.normal(size=(n_layers, n_modules, n_dims)).astype(np.float32)
        self.weights = rng.normal(size=(n_layers, n_dims, n_dims)) / np.sqrt(n_dims)
        self.text = rng.normal(size=(8, n_dims))
        self.router = rng.random((n_layers, n_modules)) < 0.5
        self.router[0, 0] = False
        self.warm = rng.random((n_tasks, n_layers, n_modules)) < 0.5
        self.calls: list[str] = []
        hidden = self.fuse(self.router) + rng.normal(size=(n_layers, n_dims)) * 0.05
        self.target = self._chain(hidden[None])[0]
        self.incumbent: np.ndarray | None = None

    def space(self, kind: str = "deep") -> Space:
        n_layers, n_modules, n_dims = self.z.shape
        return Space(
            kind=kind, n_layers=n_layers, n_modules=n_modules, n_dims=n_dims, fuse=self.fuse, warm=self.warm
        )

    def fuse(self, router: np.ndarray) -> np.ndarray:
        return (np.einsum("lk,lkd->ld", router.astype(np.float32), self.z) / self.z.shape[1]).astype(
            np.float32
        )

    def router_losses(self, routers: np.ndarray) -> np.ndarray:
        self.calls.append("router_losses")
        return self._losses(np.array([self.fuse(r) for r in routers]))

    def set_incumbent(self, z: np.ndarray) -> None:
        self.calls.append("set_incumbent")
        self.incumbent = z.copy()

    def layer_losses(self, layer: int, z: np.ndarray) -> np.ndarray:
        self.calls.append("layer_losses")
        assert self.incumbent is not None
        candidates = np.repeat(self.incumbent[None], len(z), 0)
        candidates[:, layer] = z
        return self._losses(candidates)

    def commit(self, layer: int, z: np.ndarray) -> None:
        self.calls.append("commit")
        assert self.incumbent is not None
        self.incumbent[layer] = z

    def dev(self, z: np.ndarray) -> Scores:
        self.calls.append("dev")
        loss = float(self._losses(z[None])[0])
        return Scores(round(1 / (1 + loss), 2) if np.isfinite(loss) else 0.0, loss)

    def _losses(self, z: np.ndarray) -> np.ndarray:
        return np.array([float(((self._chain(one[None])[0] - self.target) ** 2).mean()) for one in z])

    def _chain(self, z: np.ndarray) -> np.ndarray:
        hidden = np.repeat(self.text[None], len(z), 0)
        for layer, weight in enumerate(self.weights):
            hidden = hidden + np.tanh(hidden @ weight + 2 * z[:, layer, None].astype(np.float64))
        return hidden

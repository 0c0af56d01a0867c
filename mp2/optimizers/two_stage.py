"""The two stages (paper, section 3.4 and appendix A.2).

Search the router, fuse, then move the fused prompts layer by layer.

The driver knows the backbone only as a function from candidates to losses (:class:`Objective`), and asks
for every loss and score through :class:`Evaluations`, always in the same order: where these remember a run
that was cut off (``mp2.runs.recorder``), the driver follows it without any forward and goes on.

*Iterations* are candidates evaluated on the whole few-shot training set. The first is the untuned prompt
(every module on); stage I has the first 200 (shallow) or 100 (deep) with it, stage II what is left. The
last generation of a stage is smaller when the budget asks for it: it may still improve the incumbent,
CMA-ES is not told of it. Dev evaluations are counted and timed apart.

*Selection.* Dev is evaluated for the untuned prompt, after stage I, then once a round of layer visits
(deep) or every 100 iterations (shallow) and at the end, whenever the incumbent has changed; with
``dev_every`` so often, in stage I too (Figure 3). The best dev score wins; ties go to the lower dev loss,
then to the earlier checkpoint. So tuning never returns something that dev ranks below the untuned prompt.
Without a dev set the lowest training loss wins, at the same places.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mp2.optimizers.cma_layers import import_cma, layer_searches
from mp2.optimizers.config import Kind, SearchConfig
from mp2.optimizers.router_search import (
    Losses,
    Routers,
    RouterSearch,
    create_router_search,
    stage_one_iterations,
)

Prompt = NDArray[np.float32]  # fused intrinsic prompts z, [L', d]


class Objective(Protocol):
    """The few-shot training loss. What it returns goes to :class:`Evaluations`, which makes losses of it."""

    def router_losses(self, routers: Routers) -> Any:
        """Losses [P] of routers [P, L', K]."""
        ...

    def set_incumbent(self, z: Prompt) -> None:
        """Every layer's prompt [L', d]."""
        ...

    def layer_losses(self, layer: int, z: NDArray[np.float32]) -> Any:
        """Losses [P] with ``layer`` at each of z [P, d] and the others at the incumbent."""
        ...

    def commit(self, layer: int, z: NDArray[np.float32]) -> None:
        """The incumbent's ``layer`` becomes z [d]."""
        ...


@dataclass(frozen=True)
class Scores:
    """One evaluation on a split: the task's metric in [0,1], the mean loss, exact match of extraction.

    ``calibration`` is what was found of its probabilities, by name.
    """

    score: float
    loss: float
    exact_match: float | None = None
    calibration: Mapping[str, float] | None = None


class Evaluations(Protocol):
    """Losses and scores as they are computed, or as they are known from before."""

    iteration: int  # candidates evaluated on the training set

    @property
    def live(self) -> bool:
        """Whether the next one will be computed."""
        ...

    def losses(
        self,
        stage: int,
        layer: int | None,
        candidates: NDArray[Any],
        compute: Callable[[], Any],
        *,
        suggest_s: float = 0.0,
        worst_so_far: float | None = None,
    ) -> Losses:
        """Finite losses [P] of candidates [P, ...]: of routers in stage 1, of a layer's prompts in stage 2.

        ``compute`` evaluates them; suggesting them took ``suggest_s``. A loss that is not finite becomes the
        worst finite one; ``worst_so_far`` is that where no other candidate is of the same population.
        """
        ...

    def scores(self, split: str, at: str, prompt: Prompt, compute: Callable[[], Any]) -> Scores:
        """Score and loss of a prompt [L', d] on a split, after the stage ``at``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is searched: the pre-trained modular prompts as arrays."""

    kind: Kind
    n_layers: int  # L': 1 if shallow
    n_modules: int
    n_dims: int
    fuse: Callable[[Routers], Prompt]  # router [L', K] -> z [L', d], eq. 1
    warm: Routers  # [n_tasks, L', K]
    n_moved: int | None = None  # the first layers, which the loss depends on; None: all

    def modules(self) -> Prompt:
        """Intrinsic prompts [L', K, d], up to a factor: what a router with one module on fuses."""
        ones = np.eye(self.n_modules, dtype=bool)[:, None, :].repeat(self.n_layers, 1)  # [K, L', K]
        return np.stack([self.fuse(router) for router in ones], 1)


@dataclass(frozen=True)
class Checkpoint:
    """A prompt that may be selected; ``dev`` is None where there is no dev set."""

    at: str  # untuned | stage1 | stage2
    iteration: int
    z: Prompt
    router: Routers  # what z was fused by, or moved away from after it was
    train_loss: float
    dev: Scores | None

    @property
    def dev_score(self) -> float | None:
        """The score on dev, if there is one."""
        return None if self.dev is None else self.dev.score

    def rank(self) -> tuple[float, float]:
        """Smaller is better: dev score, then dev loss; without dev the training loss."""
        if self.dev is None:
            return (self.train_loss if math.isfinite(self.train_loss) else math.inf, 0.0)
        return (-self.dev.score, self.dev.loss if math.isfinite(self.dev.loss) else math.inf)


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    stage: int
    iteration: int
    iters: int
    train_loss: float  # of the incumbent: the lowest so far
    dev_score: float  # of the last checkpoint; NaN: none yet, or no dev set
    live: bool  # false for what is replayed of a run that was cut off
    generation_loss: float = math.nan  # mean over the candidates of the last generation


class Observer:
    """What is told how far a search is, of what is replayed, too; does nothing."""

    def iteration(self, progress: Progress) -> None:
        """A generation was evaluated."""

    def checkpoint(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """A prompt that may be selected was scored on dev, if there is one."""


@dataclass
class Outcome:
    """What tuning found."""

    untuned: Checkpoint
    stage1: Checkpoint
    final: Checkpoint
    incumbent_loss: float  # the best training loss; ``final`` may be an earlier prompt that dev prefers
    loss_curve: list[tuple[int, float]] = field(default_factory=list)
    dev_curve: list[tuple[int, float]] = field(default_factory=list)


class TwoStage:
    """One run of both stages; :meth:`run` once."""

    def __init__(
        self,
        config: SearchConfig,
        objective: Objective,
        space: Space,
        dev: Callable[[Prompt], Any] | None,
        evaluations: Evaluations,
        observer: Observer | None = None,
    ) -> None:
        self._config, self._objective, self._space = config, objective, space
        self._dev, self._evaluations = dev, evaluations
        self._observer = observer or Observer()
        self._shape = (space.n_layers, space.n_modules)
        self._stage1_iters = stage_one_iterations(
            config.router.method, config.router.iterations, space.kind, self._shape, config.iters
        )
        self._loss = math.inf
        self._worst_loss = -math.inf
        self._generation_loss = math.nan
        self._live = False  # whether the last loss or score was computed
        self._checkpoints: list[Checkpoint] = []
        self._loss_curve: list[tuple[int, float]] = []

    def run(self) -> Outcome:
        """Tune; raises ``LossError`` when a whole generation has no finite loss."""
        router_seed, layer_seed = np.random.SeedSequence(self._config.seed).spawn(2)
        search = self._prepare(np.random.default_rng(router_seed))
        every_module = np.ones(self._shape, dtype=bool)
        self._evaluate_routers(every_module[None], 0.0)
        untuned = self._checkpoint("untuned", self._space.fuse(every_module), every_module)
        router = self._search_router(every_module, search)
        stage1 = self._checkpoint("stage1", self._space.fuse(router), router)
        if not self._config.router_only and self._evaluations.iteration < self._config.iters:
            self._search_layers(stage1, layer_seed)
        final = min(self._checkpoints, key=Checkpoint.rank)  # the earliest of equals
        return Outcome(
            untuned=untuned,
            stage1=stage1,
            final=final,
            incumbent_loss=self._loss,
            loss_curve=self._loss_curve,
            dev_curve=[(c.iteration, c.dev.score) for c in self._checkpoints if c.dev is not None],
        )

    def _prepare(self, rng: np.random.Generator) -> RouterSearch:
        """Make the router search and import what stage II needs: a second or two, before the engine works."""
        if not self._config.router_only and self._stage1_iters < self._config.iters:
            import_cma()
        return create_router_search(
            self._config.router.method,
            self._shape,
            self._stage1_iters,
            self._space.warm,
            rng,
            self._space.modules(),
        )

    def _evaluate_routers(self, routers: Routers, suggest_s: float) -> NDArray[np.float64]:
        """Losses of a stage-I population; the first call is the untuned router."""
        self._live = self._evaluations.live
        losses = self._evaluations.losses(
            1,
            None,
            routers,
            lambda: self._objective.router_losses(routers),
            suggest_s=suggest_s,
            worst_so_far=self._worst_loss if self._loss_curve and len(routers) == 1 else None,
        )
        self._count(losses)
        self._loss = min(self._loss, float(losses.min()))
        self._loss_curve.append((self._evaluations.iteration, self._loss))
        return losses

    def _search_router(self, untuned: Routers, search: RouterSearch) -> Routers:
        """Stage I: the router [L', K] with the lowest training loss, the untuned one included."""
        best, best_loss = untuned, self._loss
        last_dev = self._evaluations.iteration
        start = time.perf_counter()
        search.tell(untuned[None], np.array([best_loss]))
        while (left := self._stage1_iters - self._evaluations.iteration) > 0:
            routers = search.ask(left)
            if not len(routers):
                break
            losses = self._evaluate_routers(routers, time.perf_counter() - start)
            start = time.perf_counter()
            search.tell(routers, losses)
            if losses.min() < best_loss:
                best, best_loss = routers[int(np.argmin(losses))], float(losses.min())
            self._observer.iteration(self._progress(1))
            since, every = self._evaluations.iteration - last_dev, self._config.dev_every
            if every and since >= every and self._evaluations.iteration < self._stage1_iters:
                self._checkpoint("stage1", self._space.fuse(best), best)
                last_dev = self._evaluations.iteration
                start = time.perf_counter()
        return best

    def _search_layers(self, stage1: Checkpoint, seed: np.random.SeedSequence) -> None:
        """Stage II from stage I's fused prompt [L', d]."""
        config, evaluations, space, fused = self._config, self._evaluations, self._space, stage1.z
        n_layers = space.n_moved or space.n_layers
        sigmas = [config.layers.sigma(layer, space.kind) for layer in range(n_layers)]
        searches = layer_searches(sigmas, space.n_dims, config.layers, seed)
        round_iters = n_layers * config.layers.popsize
        dev_every = config.dev_every or (round_iters if space.kind == "deep" else 100)
        incumbent = _Incumbent(fused, self._objective)
        last_dev = evaluations.iteration
        tell_s = 0.0  # of the last generation; the next one pays for it
        best_ever = [math.inf] * n_layers  # of each layer's own generations, whatever the others held
        layer = 0
        while (left := config.iters - evaluations.iteration) > 0:
            start = time.perf_counter()
            population = searches[layer].ask()
            offsets = population[:left]
            with np.errstate(over="ignore"):  # such a candidate's loss is not finite, which is said
                candidates = (fused[layer] + offsets).astype(np.float32)
            self._live = evaluations.live
            losses = evaluations.losses(
                2,
                layer,
                candidates,
                lambda layer=layer, z=candidates: incumbent.synced().layer_losses(layer, z),  # type: ignore[misc]
                suggest_s=tell_s + time.perf_counter() - start,
                worst_so_far=self._worst_loss if len(offsets) < len(population) else None,
            )
            self._count(losses)
            best = int(np.argmin(losses))
            bar = self._loss if config.layers.keep == "incumbent" else best_ever[layer]
            if losses[best] < bar:  # then this is the incumbent's loss: it has just been measured
                self._loss = best_ever[layer] = float(losses[best])
                incumbent.commit(layer, candidates[best])
            start = time.perf_counter()
            if len(offsets) == len(population):
                searches[layer].tell(offsets, losses)
            tell_s = time.perf_counter() - start
            self._loss_curve.append((evaluations.iteration, self._loss))
            if evaluations.iteration - last_dev >= dev_every or evaluations.iteration == config.iters:
                self._checkpoint("stage2", incumbent.z.copy(), stage1.router)
                last_dev = evaluations.iteration
            self._observer.iteration(self._progress(2))
            layer = (layer + 1) % n_layers

    def _checkpoint(self, at: str, z: Prompt, router: Routers) -> Checkpoint:
        """Score z on dev if there is one, unless the last checkpoint was the same prompt."""
        last, on_dev = self._checkpoints[-1] if self._checkpoints else None, self._dev
        if on_dev is None:
            dev = None
        elif last is not None and np.array_equal(last.z, z):
            dev = last.dev
        else:
            self._live = self._evaluations.live
            dev = self._evaluations.scores("dev", at, z, lambda: on_dev(z))
        checkpoint = Checkpoint(at, self._evaluations.iteration, z, router, self._loss, dev)
        self._checkpoints.append(checkpoint)
        self._observer.checkpoint(checkpoint, self._progress(2 if at == "stage2" else 1))
        return checkpoint

    def _count(self, losses: Losses) -> None:
        """What is remembered of every generation."""
        self._worst_loss = max(float(losses.max()), self._worst_loss)
        self._generation_loss = float(losses.mean())

    def _progress(self, stage: int) -> Progress:
        score = self._checkpoints[-1].dev_score if self._checkpoints else None
        dev = math.nan if score is None else score
        iters = self._stage1_iters if self._config.router_only else self._config.iters
        done, mean = self._evaluations.iteration, self._generation_loss
        return Progress(stage, done, iters, self._loss, dev, self._live, mean)


class _Incumbent:
    """The current prompt [L', d]; the objective hears of it only once something must be computed."""

    def __init__(self, z: Prompt, objective: Objective) -> None:
        self.z = z.copy()
        self._objective: Any = objective
        self._synced = False

    def synced(self) -> Objective:
        """The objective, at this incumbent."""
        if not self._synced:
            self._objective.set_incumbent(self.z.copy())
            self._synced = True
        return self._objective  # type: ignore[no-any-return]

    def commit(self, layer: int, z: NDArray[np.float32]) -> None:
        """The incumbent's ``layer`` becomes z [d]."""
        self.z[layer] = z
        if self._synced:
            self._objective.commit(layer, z.copy())

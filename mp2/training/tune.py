"""MP2 on a few-shot task by gradient: the router first, then the prompts (paper section 3.4, Figure 6a).

Stage I trains the new task's router logits [L', K] from a random start by Adam, through relaxed Bernoulli
samples (eqs. 2-5), with everything else frozen. Stage II freezes the router and trains the soft prompts p_k
[m, H] themselves that it has selected (not their intrinsic z: Figure 6a). The backbone, and the span head,
never change.

The prompts are held as modular prompts of intrinsic dimension K whose z is the identity: A then *is* the K
soft prompts, so that training, the engine's dev and test scores and the prompt file all stay what they are.

*Selection* is as in black-box tuning: dev is scored for the untuned prompt (every module on) and every
``dev_every`` epochs, the best score wins, ties go to the lower dev loss, then to the earlier checkpoint.
Stage II starts from the router that stage I's best checkpoint had. A layer in which hard inference would
switch every module off keeps the one of the highest logit: nothing could be trained there otherwise.
``router_epochs = 0`` leaves stage I out: every module is on, and with one module (``mp2 scratch``) that is
plain prompt tuning, from a random start. An *iteration* is an
epoch: one pass over the few-shot training set (here forward and backward).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mp2.engine import Objective, Scorer
from mp2.errors import LossError
from mp2.optimizers.config import LayerConfig
from mp2.optimizers.two_stage import Checkpoint, Observer, Outcome, Progress, Prompt, Scores
from mp2.prompts import ModularPrompts, PromptSet
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.result import temperature_of
from mp2.tasks import MrcInput
from mp2.training.config import TuneConfig
from mp2.training.mixture import pad
from mp2.training.prompted import span_losses

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Token ids and mask [N, T], gold starts and ends [N]."""
PARTS = 4  # of a batch, by length


def as_soft_prompts(prompts: PromptSet, task: str) -> PromptSet:
    """The same modular prompts with d = K and z = 1: A [L', K, m*H] holds the soft prompts p_k = z_k A."""
    meta = replace(
        prompts.meta,
        intrinsic_dim=prompts.meta.n_modules,
        tasks=(task,),
        provenance={"made_by": "mp2 tune", "from": prompts.sha256},
    )
    return PromptSet(
        meta=meta,
        z=torch.eye(meta.n_modules).expand(meta.shapes()["z"]).contiguous(),
        projection=torch.bmm(prompts.z, prompts.projection),
        routers=torch.zeros(meta.shapes()["routers"]),
        span_weight=prompts.span_weight,
        span_bias=prompts.span_bias,
    )


def started(prompts: PromptSet, seed: int) -> PromptSet:
    """The prompts, with a random z where a layer has none but zeros, as ``mp2 scratch`` makes them.

    Under z = 0 the m rows of a soft prompt are equal, get equal gradients and stay equal: m rows that do the
    work of one. The start drawn for such a layer is N(0, sigma^2), sigma the first step of ``mp2 bbt``: what
    its first population would have held.
    """
    generator = torch.Generator().manual_seed(seed)
    z = prompts.z.clone()
    for layer, modules in enumerate(z):
        if not modules.any():
            sigma = LayerConfig().sigma(layer, "deep" if prompts.kind == "deep" else "shallow")
            modules.normal_(0.0, sigma, generator=generator)
    return replace(prompts, z=z)


def never_empty(weights: Tensor, logits: Tensor) -> Tensor:
    """Router weights [L', K], with the module of the highest logit on in every layer where none is."""
    highest = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(weights.dtype)
    return torch.where(weights.any(-1, keepdim=True), weights, highest)


@dataclass
class TuneOutcome:
    """What tuning found: the stages as black-box tuning reports them, and the selected soft prompts."""

    stages: Outcome
    prompts: PromptSet
    seconds: dict[str, float] = field(default_factory=dict)
    n_dev: int = 0


class GradientTuner:
    """One run of both stages; :meth:`run` once. A function of its config and data (CPU, float32)."""

    def __init__(
        self,
        config: TuneConfig,
        problem: FewShotProblem,
        observer: Observer | None = None,
    ) -> None:
        """``observer`` is told of every epoch, and of every prompt that is scored."""
        self.config, self.problem, self._observer = config, problem, observer or Observer()
        self._device = torch.device(problem.model.runtime.device)
        self._start = as_soft_prompts(started(problem.model.prompts, config.run.seed), problem.card.task)
        generator = torch.Generator().manual_seed(config.run.seed)
        self._model = ModularPrompts(self._start.meta, generator)  # a random router, U(+-1e-3)
        with torch.no_grad():
            for name in ("z", "projection", "span_weight", "span_bias"):
                getattr(self._model, name).copy_(getattr(self._start, name))
        self._model.to(self._device).requires_grad_(False)
        encoder = problem.model.backbone.encoder
        self._encoder = encoder if self._device.type == "cpu" else copy.deepcopy(encoder).to(self._device)
        self._rng = np.random.default_rng([config.run.seed, 7])
        self._noise = torch.Generator().manual_seed(config.run.seed + 1)
        self._seconds = dict.fromkeys(("stage1", "stage2", "dev"), 0.0)
        self._checkpoints: list[Checkpoint] = []
        self._best: tuple[Checkpoint, PromptSet, Tensor] | None = None  # with its router weights [L', K]
        self._loss_curve: list[tuple[int, float]] = []
        self._epoch = 0

    def run(self) -> TuneOutcome:
        """Tune; raises ``LossError`` at a loss that is not finite."""
        router_lr, prompt_lr = self.config.rates(self.problem.model.kind)
        untuned = self._check("untuned", self._start, torch.ones(self._model.routers.shape[1:]))
        stage_one = self.config.router_epochs
        stage_one = self.config.epochs // 2 if stage_one is None else stage_one
        self._train("stage1", self._model.routers, router_lr, stage_one)
        assert self._best is not None
        stage1, _, weights = self._best
        if not self.config.run.router_only:
            self._train("stage2", self._model.projection, prompt_lr, self.config.epochs, weights)
        final, prompts, _ = self._best
        return TuneOutcome(
            stages=Outcome(
                untuned=untuned,
                stage1=stage1,
                final=final,
                incumbent_loss=min(c.train_loss for c in self._checkpoints),
                loss_curve=self._loss_curve,
                dev_curve=[(c.iteration, c.dev.score) for c in self._checkpoints if c.dev is not None],
            ),
            prompts=prompts,
            seconds=self._seconds,
            n_dev=sum(c.dev is not None for c in self._checkpoints),
        )

    def scorer(self, prompts: PromptSet) -> FewShotProblem:
        """The same examples under other soft prompts."""
        problem = copy.copy(self.problem)
        problem.model = replace(problem.model, prompts=prompts)
        forward = problem.model.runtime.forward(prompts)
        problem.objective, problem.scorer = Objective(forward, problem.train_inputs), Scorer(forward)
        return problem

    def test_scores(
        self, stages: Mapping[str, Checkpoint], selected: PromptSet
    ) -> tuple[dict[str, Scores], int, float]:
        """Test scores of each stage's prompt; how many prompts were scored (each once), and the seconds.

        ``selected`` are the soft prompts of a checkpoint of stage II; those of all others are the first ones.
        """
        begun = time.perf_counter()
        known: dict[tuple[bytes, bool], Scores] = {}
        scores = {}
        for name, checkpoint in stages.items():
            trained = checkpoint.at == "stage2"
            key = (checkpoint.z.tobytes(), trained)
            if key not in known:
                scorer = self.scorer(selected if trained else self._start)
                known[key] = scorer.test_scores(checkpoint.z, temperature_of(checkpoint)).fetch()
            scores[name] = known[key]
        return scores, len(known), time.perf_counter() - begun

    def _train(
        self, stage: str, parameter: torch.nn.Parameter, rate: float, until: int, frozen: Tensor | None = None
    ) -> None:
        """Train ``parameter`` to epoch ``until``; router weights are ``frozen`` [L', K], or sampled anew."""
        parameter.requires_grad_(True)
        optimizer = torch.optim.Adam([parameter], lr=rate)
        while self._epoch < until:
            begun = time.perf_counter()
            losses = []
            for parts in self._batches():
                weights = frozen if frozen is not None else self._sampled_weights()
                optimizer.zero_grad(set_to_none=True)
                loss = self._backward(parts, weights.to(self._device))
                if not math.isfinite(loss):
                    raise LossError(f"the loss is {loss} in epoch {self._epoch + 1}")
                optimizer.step()
                losses.append(loss)
            self._epoch += 1
            self._seconds[stage] += time.perf_counter() - begun
            self._observer.iteration(self._progress(stage, float(np.mean(losses))))
            if self._epoch % self.config.dev_every == 0 or self._epoch == until:
                prompts = self._model.to_set() if stage == "stage2" else self._start
                inference = frozen if frozen is not None else self._inference_weights()
                self._check(stage, prompts, inference)
        parameter.requires_grad_(False)

    def _inference_weights(self) -> Tensor:
        weights = self._model.router_weights(0).detach().cpu()
        return never_empty(weights, self._model.routers[0].detach().cpu())

    def _sampled_weights(self) -> Tensor:
        return self._model.router_weights(0, temperature=self.config.temperature, generator=self._noise)

    def _backward(self, parts: list[Batch], weights: Tensor) -> float:
        """Add the gradient of a batch's mean loss, part by part; returns the loss.

        Each part's graph is gone before the next part runs. What all parts share, the way from the logits to
        the router weights, is gone back once, with the sum of their gradients.
        """
        n = sum(len(part[0]) for part in parts)
        total = torch.zeros((), device=self._device)
        shared = weights.detach().requires_grad_(weights.requires_grad)
        for ids, mask, starts, ends in parts:
            start, end = self._model(self._encoder, ids, mask, shared)
            loss = span_losses(start, end, mask, starts, ends).sum() / n
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            del start, end, loss  # they hold the graph
        if weights.requires_grad:
            weights.backward(shared.grad)  # type: ignore[no-untyped-call]
        return float(total)

    def _batches(self) -> list[list[Batch]]:
        """An epoch's batches, in an order of its own; each in parts of similar length, to save padding."""
        train = self.problem.train_inputs
        order = self._rng.permutation(len(train))
        batches = []
        for first in range(0, len(order), self.config.batch_size):
            chosen = [train[i] for i in order[first : first + self.config.batch_size]]
            chosen.sort(key=lambda x: x.n_tokens)
            size = math.ceil(len(chosen) / PARTS)
            batches.append([self._place(chosen[i : i + size]) for i in range(0, len(chosen), size)])
        return batches

    def _place(self, inputs: list[MrcInput]) -> Batch:
        ids, mask = pad(inputs, self.problem.model.backbone.tokenizer.pad_id)
        gold = np.array([[x.start, x.end] for x in inputs], np.int64)
        arrays = (ids, mask, gold[:, 0].copy(), gold[:, 1].copy())
        ids_t, mask_t, starts, ends = (torch.from_numpy(a).to(self._device) for a in arrays)
        return ids_t, mask_t, starts, ends

    def _check(self, at: str, prompts: PromptSet, weights: Tensor) -> Checkpoint:
        """Train loss and dev score of the prompts under inference weights [L', K]."""
        begun = time.perf_counter()
        scorer = self.scorer(prompts)
        z: Prompt = prompts.fuse(weights).numpy()
        train_loss = float(scorer.objective.full_losses(z[None]).fetch()[0])
        dev: Scores | None = scorer.on_dev(z).fetch() if scorer.on_dev else None
        self._seconds["dev"] += time.perf_counter() - begun
        router = (weights > 0.5).cpu().numpy()
        checkpoint = Checkpoint(at, self._epoch, z, router, train_loss, dev)
        self._checkpoints.append(checkpoint)
        self._loss_curve.append((self._epoch, train_loss))
        if self._best is None or checkpoint.rank() < self._best[0].rank():
            self._best = (checkpoint, prompts, weights)
        self._observer.checkpoint(checkpoint, self._progress(at))
        return checkpoint

    def _progress(self, at: str, loss: float = math.nan) -> Progress:
        """Where tuning is; ``loss``: of the last epoch's batches."""
        last = self._checkpoints[-1] if self._checkpoints else None
        stage, train_loss = (2 if at == "stage2" else 1), math.nan if last is None else last.train_loss
        on_dev = math.nan if last is None or last.dev is None else last.dev.score
        return Progress(stage, self._epoch, self.config.epochs, train_loss, on_dev, True, loss)

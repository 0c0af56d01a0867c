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

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from mp2.errors import LossError
from mp2.optimizers.config import LayerConfig
from mp2.optimizers.two_stage import Observer
from mp2.prompts import PromptSet
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.training.config import TuneConfig
from mp2.training.prompted import in_precision, span_losses
from mp2.training.tuner import Batch, TuneOutcome, Tuner


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


class GradientTuner(Tuner):
    """MP2's two stages."""

    def __init__(
        self,
        config: TuneConfig,
        problem: FewShotProblem,
        observer: Observer | None = None,
    ) -> None:
        start = as_soft_prompts(started(problem.model.prompts, config.run.seed), problem.card.task)
        super().__init__(config, problem, start, observer)
        self._noise = torch.Generator().manual_seed(config.run.seed + 1)

    def run(self) -> TuneOutcome:
        """Tune; raises ``LossError`` at a loss that is not finite."""
        router_lr, prompt_lr = self.config.rates(self.problem.model.kind)
        untuned = self._check("untuned", self._start, torch.ones(self._model.routers.shape[1:]))
        stage_one = self.config.router_epochs
        stage_one = self.config.n_epochs // 2 if stage_one is None else stage_one
        self._train("stage1", self._model.routers, router_lr, stage_one)
        assert self._best is not None
        stage1, _, weights = self._best
        if not self.config.run.router_only:
            self._train("stage2", self._model.projection, prompt_lr, self.config.n_epochs, weights)
        return self._outcome(untuned, stage1)

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
            self._tell_epoch(stage, losses)
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
            with in_precision(self._device, self.config.training_precision):
                start, end = self._model(self._encoder, ids, mask, shared)
            loss = span_losses(start, end, mask, starts, ends).sum() / n
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            del start, end, loss  # they hold the graph
        if weights.requires_grad:
            weights.backward(shared.grad)  # type: ignore[no-untyped-call]
        return float(total)

"""Few-shot tuning of one soft prompt, a span head, or the whole backbone, by Adam: `mp2.training.methods`.

Each learning rate of the method is run from the same start for all epochs; dev chooses the rate and the
epoch. What is selected is a prompt file like any other (K = d = 1, A the rows), so that the engine scores it
and ``mp2 predict`` reads it; after model tuning there is a backbone of its own beside it.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from mp2.backbone import Backbone, freeze
from mp2.engine import Backend, create_backend
from mp2.errors import LossError
from mp2.optimizers.two_stage import Checkpoint, Observer
from mp2.prompts import PromptSet
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.run_folder import OWN_BACKBONE
from mp2.training.config import TuneConfig
from mp2.training.methods.method import Method, for_task
from mp2.training.prompted import in_precision, span_losses
from mp2.training.tuner import Batch, TuneOutcome, Tuner


class SoftPromptTuner(Tuner):
    """One run of one method, from the single prompt that ``problem.model`` has."""

    def __init__(
        self,
        config: TuneConfig,
        method: Method,
        problem: FewShotProblem,
        observer: Observer | None = None,
    ) -> None:
        super().__init__(config, problem, for_task(problem.model.prompts, problem.card.task), observer)
        self.method, self.rates = method, config.lr or method.rates
        if method.trains_backbone:
            self._encoder = copy.deepcopy(problem.model.backbone.encoder).to(self._device)
        self._first = copy.deepcopy(self._encoder.state_dict()) if method.trains_backbone else {}
        self._backbone = problem.model.backbone
        self._selected: dict[str, Tensor] = {}  # the backbone's weights at the best checkpoint
        self._dropout = torch.Generator().manual_seed(config.run.seed + 1)

    def run(self) -> TuneOutcome:
        """See `Tuner.run`."""
        untuned = self._check("untuned", self._start, self._ones())
        chosen: float | None = None
        for rate in self.rates:
            before = self._best
            self._restart()
            self._train(rate)
            chosen = rate if self._best is not before else chosen
        outcome = self._outcome(untuned, untuned)
        outcome.rate = chosen
        if self.method.trains_backbone:
            outcome.backbone = self._tuned_backbone()
            meta = replace(
                outcome.prompts.meta,
                backbone=outcome.backbone.name,
                backbone_sha256=outcome.backbone.sha256,
            )
            outcome.prompts = replace(outcome.prompts, meta=meta)
        return outcome

    def n_epochs(self) -> int:
        """Epochs of all rates together."""
        return self.config.n_epochs * len(self.rates)

    def scoring_backend(self, trained: bool) -> Backend:
        """See `Tuner.scoring_backend`; a new one over the weights as they are now."""
        backend = self.problem.model.backend
        if not (trained and self.method.trains_backbone):
            return backend
        config = self.problem.config
        backbone = replace(self._backbone, encoder=self._encoder.eval())
        return create_backend(
            backend.name,
            backbone,
            device=str(backend.device),
            threads=config.threads,
            precision=backend.precision,
        )

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        model = self._model
        rows = [model.projection] if model.meta.prompt_tokens else []
        backbone = list(self._encoder.parameters()) if self.method.trains_backbone else []
        return [*rows, model.span_weight, model.span_bias, *backbone]

    def _ones(self) -> Tensor:
        return torch.ones(self._start.z.shape[:2])

    def _restart(self) -> None:
        """Go back to the start: every rate has the same one."""
        with torch.no_grad():
            for name in ("projection", "span_weight", "span_bias"):
                getattr(self._model, name).copy_(getattr(self._start, name))
        if self._first:
            self._encoder.load_state_dict(self._first)

    def _train(self, rate: float) -> None:
        trained = self.parameters()
        for parameter in trained:
            parameter.requires_grad_(True)
        decayed = [p for p in trained if p.dim() > 1]
        groups = [
            {"params": decayed, "weight_decay": self.method.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=rate)  # without decay it is Adam
        end = self._epoch + self.config.n_epochs
        while self._epoch < end:
            begun = time.perf_counter()
            losses = []
            for parts in self._batches():
                optimizer.zero_grad(set_to_none=True)
                loss = self._backward(parts)
                if not math.isfinite(loss):
                    raise LossError(f"the loss is {loss} in epoch {self._epoch + 1} (rate {rate:g})")
                if self.method.clip is not None:
                    nn.utils.clip_grad_norm_(trained, self.method.clip)
                optimizer.step()
                losses.append(loss)
            self._epoch += 1
            self._seconds["stage2"] += time.perf_counter() - begun
            self._tell_epoch("stage2", losses)
            if self._epoch % self.config.dev_every == 0 or self._epoch == end:
                self._check("stage2", self._model.to_set(), self._ones())
        for parameter in trained:
            parameter.requires_grad_(False)

    def _backward(self, parts: list[Batch]) -> float:
        """Add the gradient of a batch's mean loss, part by part; returns the loss."""
        n = sum(len(part[0]) for part in parts)
        total = torch.zeros((), device=self._device)
        kept = self._kept()
        weights = self._ones().to(self._device)
        for ids, mask, starts, ends in parts:
            rows = self._model.prompts(weights)
            rows = rows if kept is None else rows * kept
            with in_precision(self._device, self.config.training_precision):
                start, end = self._model.logits(self._encoder, ids, mask, rows)
            loss = span_losses(start, end, mask, starts, ends).sum() / n
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            del start, end, loss, rows  # they hold the graph
        return float(total)

    def _kept(self) -> Tensor | None:
        """Dropout of this step's soft prompts [L', m, H]: 0 or 1 / (1 - rate); None: there is none."""
        if not self.method.dropout:
            return None
        meta = self._start.meta
        shape = (meta.prompt_layers, meta.prompt_tokens, meta.hidden)
        kept = torch.rand(shape, generator=self._dropout) >= self.method.dropout
        return (kept.float() / (1 - self.method.dropout)).to(self._device)

    def _check(self, at: str, prompts: PromptSet, weights: Tensor) -> Checkpoint:
        before = self._best
        checkpoint = super()._check(at, prompts, weights)
        if self.method.trains_backbone and self._best is not before:
            self._selected = copy.deepcopy(self._encoder.state_dict())
        return checkpoint

    def _tuned_backbone(self) -> Backbone:
        """The selected weights as a backbone with its own hash, which `scoring_backend` has from now on."""
        self._encoder.load_state_dict(self._selected or self._first)  # the start, if nothing was better
        config = replace(self._backbone.config, name=OWN_BACKBONE)
        self._backbone = freeze(config, copy.deepcopy(self._encoder).cpu(), self._backbone.tokenizer)
        return self._backbone

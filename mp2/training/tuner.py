"""What few-shot tuning by gradient shares: batches, train loss and dev score of a checkpoint, selection.

An *iteration* is an epoch: one pass over the few-shot training set, forward and backward. Dev is scored
before anything is trained and every ``dev_every`` epochs; the best score wins, ties go to the lower dev loss,
then to the earlier checkpoint, as in black-box tuning.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mp2.backbone import Backbone
from mp2.engine import Backend, Objective, Scorer
from mp2.optimizers.two_stage import Checkpoint, Observer, Outcome, Progress, Prompt, Scores
from mp2.prompts import ModularPrompts, PromptSet
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.result import temperature_of
from mp2.tasks import MrcInput
from mp2.training.config import TuneConfig
from mp2.training.mixture import pad

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Token ids and mask [N, T], gold starts and ends [N]."""
PARTS = 4  # of a batch, by length


@dataclass
class TuneOutcome:
    """What tuning found: the stages as black-box tuning reports them, and the selected soft prompts.

    ``rate`` is the learning rate that dev chose, where several could be tried; ``backbone`` the tuned one, of
    model tuning.
    """

    stages: Outcome
    prompts: PromptSet
    seconds: dict[str, float] = field(default_factory=dict)
    n_dev: int = 0
    rate: float | None = None
    backbone: Backbone | None = None


class Tuner(ABC):
    """One run; :meth:`run` once. A function of its config and data (CPU, float32)."""

    def __init__(
        self,
        config: TuneConfig,
        problem: FewShotProblem,
        start: PromptSet,
        observer: Observer | None = None,
    ) -> None:
        """``start`` are the prompts that are trained from; their metadata is that of the result.

        ``observer`` is told of every epoch, and of every prompt that is scored.
        """
        self.config, self.problem, self._observer = config, problem, observer or Observer()
        self._device = torch.device(problem.model.backend.device)
        self._start = start
        generator = torch.Generator().manual_seed(config.run.seed)
        self._model = ModularPrompts(start.meta, generator)  # a random router, U(+-1e-3)
        with torch.no_grad():
            for name in ("z", "projection", "span_weight", "span_bias"):
                getattr(self._model, name).copy_(getattr(start, name))
        self._model.to(self._device).requires_grad_(False)
        encoder = problem.model.backbone.encoder
        self._encoder = encoder if self._device.type == "cpu" else copy.deepcopy(encoder).to(self._device)
        self._rng = np.random.default_rng([config.run.seed, 7])
        self._seconds = dict.fromkeys(("stage1", "stage2", "dev"), 0.0)
        self._checkpoints: list[Checkpoint] = []
        self._best: tuple[Checkpoint, PromptSet, Tensor] | None = None  # with its router weights [L', K]
        self._loss_curve: list[tuple[int, float]] = []
        self._epoch = 0

    @abstractmethod
    def run(self) -> TuneOutcome:
        """Tune; raises ``LossError`` at a loss that is not finite."""

    def scoring_backend(self, trained: bool) -> Backend:
        """What scores: over the backbone as it is loaded, or as it is ``trained``, where that differs."""
        return self.problem.model.backend

    def n_epochs(self) -> int:
        """Epochs of the whole run."""
        return self.config.n_epochs

    def scorer(self, prompts: PromptSet, trained: bool = True) -> FewShotProblem:
        """The same examples under other soft prompts."""
        problem = copy.copy(self.problem)
        problem.model = replace(problem.model, prompts=prompts)
        forward = self.scoring_backend(trained).forward(prompts)
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
                scorer = self.scorer(selected if trained else self._start, trained)
                known[key] = scorer.test_scores(checkpoint.z, temperature_of(checkpoint)).fetch()
            scores[name] = known[key]
        return scores, len(known), time.perf_counter() - begun

    def _outcome(self, untuned: Checkpoint, stage1: Checkpoint) -> TuneOutcome:
        assert self._best is not None
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
        scorer = self.scorer(prompts, at == "stage2")
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

    def _tell_epoch(self, at: str, losses: Sequence[float]) -> None:
        """Tell the observer of an epoch whose batches had these losses."""
        self._observer.iteration(self._progress(at, float(np.mean(losses))))

    def _progress(self, at: str, loss: float = math.nan) -> Progress:
        """Where tuning is; ``loss``: of the last epoch's batches."""
        last = self._checkpoints[-1] if self._checkpoints else None
        stage, train_loss = (2 if at == "stage2" else 1), math.nan if last is None else last.train_loss
        on_dev = math.nan if last is None or last.dev is None else last.dev.score
        return Progress(stage, self._epoch, self.n_epochs(), train_loss, on_dev, True, loss)

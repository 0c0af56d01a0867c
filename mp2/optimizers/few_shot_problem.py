"""What a run optimises: a task's few-shot training set under a frozen backbone and its modular prompts.

Everything that can be wrong with the input is found here, before a run folder exists and before any forward.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mp2.errors import MismatchError, UsageError
from mp2.optimizers.config import BbtConfig, Kind
from mp2.optimizers.recorder import Scores
from mp2.optimizers.router_search import check_method, stage_one_iterations
from mp2.optimizers.routers import Routers
from mp2.optimizers.task_data import TaskData
from mp2.optimizers.two_stage import Prompt, Space

if TYPE_CHECKING:
    from mp2.backbone import Backbone
    from mp2.engine import Runtime
    from mp2.engine.select import AnyObjective
    from mp2.prompts import PromptSet
    from mp2.tasks import Example, MrcInput, TaskCard


@dataclass(frozen=True)
class FrozenModel:
    """Backbone, modular prompts and the runtime that runs them; shared by the seeds of a series."""

    backbone: Backbone
    prompts: PromptSet
    runtime: Runtime

    @property
    def kind(self) -> Kind:
        """Deep or shallow."""
        return "shallow" if self.prompts.kind == "shallow" else "deep"

    def max_tokens(self, requested: int | None) -> int:
        """Tokens that a sequence may have; inline prompts take positions of their own."""
        meta = self.prompts.meta
        room = self.backbone.config.max_positions - meta.n_inline
        if requested is not None and requested > room:
            kind = f"{self.kind} inline" if self.kind == "deep" and meta.n_inline else self.kind
            raise UsageError(f"max_tokens is {requested}, expected at most {room} with {kind} prompts")
        return requested or room

    def fuse(self, router: Routers) -> Prompt:
        """Fused intrinsic prompts [L', d] of a router [L', K] (eq. 1)."""
        import torch

        z = self.prompts.fuse(torch.from_numpy(np.ascontiguousarray(router)))
        return np.ascontiguousarray(z.detach().cpu().numpy(), dtype=np.float32)

    def space(self) -> Space:
        """The prompts as what is searched."""
        n_layers, n_modules, n_dims = self.prompts.z.shape
        warm = (self.prompts.routers > 0).cpu().numpy().reshape(-1, n_layers, n_modules)
        return Space(
            kind=self.kind, n_layers=n_layers, n_modules=n_modules, n_dims=n_dims, fuse=self.fuse, warm=warm
        )


def default_prompts(config: BbtConfig) -> str:
    """The prompt file's name: what was asked for, or the embedded one of the backbone."""
    if config.prompts is not None:
        return config.prompts
    if config.backbone != "mini":
        raise UsageError(
            f"no prompts were named for backbone '{config.backbone}': give --prompts FILE "
            "(mp2 pretrain makes one); only 'mini' has embedded ones"
        )
    return "mini-shallow" if config.kind == "shallow" else "mini-deep"


def resolve_paths(config: BbtConfig) -> BbtConfig:
    """The config with absolute paths, MP2_DATA and full method names: it can be run again from anywhere."""
    import torch

    data = config.data or os.environ.get("MP2_DATA") or None
    prompts = default_prompts(config)
    return replace(
        config,
        task=_absolute(config.task) if config.task.endswith(".toml") else config.task,
        data=_absolute(data) if data else None,
        backbone=_absolute(config.backbone),
        prompts=_absolute(prompts),
        engine=_absolute(config.engine) if config.engine else None,
        router=replace(config.router, method=check_method(config.router.method)),
        threads=config.threads or torch.get_num_threads(),  # sums depend on it in their last bits
    )


def _absolute(name: str) -> str:
    """A path if there is something there, else the name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def load_model(config: BbtConfig) -> FrozenModel:
    """Load what a run needs besides data.

    Raises:
        UsageError: unknown names, missing packages, files that do not fit each other.
    """
    from mp2.backbone import load_backbone
    from mp2.engine import create_runtime
    from mp2.prompts import load_prompts

    backbone = load_backbone(config.backbone)
    prompts = load_prompts(default_prompts(config), backbone)
    if config.kind not in ("auto", prompts.kind):
        raise MismatchError(
            f"the prompts of {default_prompts(config)} are {prompts.kind}, expected {config.kind}: "
            f"drop --{config.kind} or give other --prompts"
        )
    runtime = create_runtime(
        config.runtime,
        backbone,
        engine_dir=Path(config.engine) if config.engine else None,
        device=config.device,
        threads=config.threads,
        precision=config.precision,
    )
    return FrozenModel(backbone, prompts, runtime)


class FewShotProblem:
    """Few-shot train and dev of one task and seed, formatted; the training loss; scores on any split."""

    def __init__(
        self, config: BbtConfig, card: TaskCard, model: FrozenModel, data: TaskData | None = None
    ) -> None:
        """``data``: the task's, where another seed has read it already."""
        from mp2.engine import create_objective
        from mp2.tasks import few_shot_split

        self.config, self.card, self.model = config, card, model
        space = model.space()
        shape = (space.n_layers, space.n_modules)
        stage_one_iterations(config.router.method, config.router.iterations, model.kind, shape, config.iters)
        self.data = data or TaskData(config, card, model)
        self.max_tokens = self.data.max_tokens
        split = few_shot_split(card, self.data.pool, config.seed, config.shots)
        self._dev = split.dev
        self.train_inputs = [self.data.formatter.training_input(e, i) for i, e in enumerate(split.train)]
        self.dev_inputs = self.data.inputs(split.dev)
        self.n_train, self.n_dev = len(self.train_inputs), len(split.dev)
        self.data_sha256 = _inputs_sha256([*self.train_inputs, *self.dev_inputs])
        self.objective: AnyObjective = create_objective(
            model.runtime, model.backbone, model.prompts, self.train_inputs
        )

    def dev_scores(self, z: Prompt) -> Scores:
        """Score and loss of z [L', d] on the few-shot dev set; the loss is the mean over its sequences."""
        return self._scores(z, self._dev, self.dev_inputs)

    def test_scores(self, z: Prompt) -> Scores:
        """Score and loss of z [L', d] on the test set; examples that do not fit count as wrong."""
        fitting = self.data.fitting_tests
        scores = self._scores(z, fitting, self.data.test_inputs)
        return replace(scores, score=scores.score * (len(fitting) / self.n_test))

    def test_inputs(self) -> list[MrcInput]:
        """The sequences that a test evaluation runs."""
        return self.data.test_inputs

    @property
    def n_test(self) -> int:
        """Test examples that are scored."""
        return len(self.data.tests)

    def _scores(self, z: Prompt, examples: Sequence[Example], inputs: Sequence[MrcInput]) -> Scores:
        from mp2.tasks import decode, score

        start, end = self.objective.log_probs(z, inputs)
        losses = [
            -(float(s[i.start]) + float(e[i.end])) / 2 for i, s, e in zip(inputs, start, end, strict=True)
        ]
        predictions = decode(self.card, examples, inputs, start, end)
        return Scores(float(score(self.card, predictions, examples)), float(np.mean(losses)))


def _inputs_sha256(inputs: Sequence[MrcInput]) -> str:
    h = hashlib.sha256()
    for item in inputs:
        h.update(np.asarray(item.input_ids, dtype="<i8").tobytes())
        h.update(f"{item.start} {item.end};".encode())
    return h.hexdigest()

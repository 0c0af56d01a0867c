"""Multi-task pre-training of modular prompts and routers over a frozen backbone.

Paper section 3.3, appendix A.1.

With ``backbone_lr`` above zero the backbone's own weights are trained too, beside the prompts: the second
backbone stage that a small masked language model needs before prompts alone can steer it. Whoever uses it
says so in the model card; the result is a new backbone with its own hash.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mp2.backbone.load import Backbone, freeze, save_backbone, weights_sha256
from mp2.errors import FormatError, MismatchError, shown
from mp2.files import open_to_append, write_all, write_json
from mp2.journal_lines import journal_line
from mp2.json_files import Fields, check, number, object_of
from mp2.prompts import ModularPrompts, PromptMeta, PromptSet, new_meta, save_prompts
from mp2.training.checkpoint import SCORES_LINE, alone_in, cut_back
from mp2.training.config import PretrainConfig
from mp2.training.methods.prompt_tuning import begin_single
from mp2.training.mixture import Batch, MixtureTask, sample_batch
from mp2.training.outputs import PretrainResult, write_outputs
from mp2.training.prompted import PromptedEncoder, dev_scores, in_precision, table
from mp2.training.ranks import Ranks
from mp2.training.trainer import Trainer


class Pretrainer(Trainer[Batch]):
    """One pre-training run in one folder: sampling, steps, checkpoints, dev scores."""

    model: PromptedEncoder

    def __init__(
        self,
        backbone: Backbone,
        tasks: Sequence[MixtureTask],
        config: PretrainConfig,
        out: Path,
        *,
        init: PromptSet | None = None,
        ranks: Ranks | None = None,
        log: Callable[[str], None] = lambda _: None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            out,
            n_steps=config.steps,
            checkpoint="checkpoint.safetensors",
            journal="losses.jsonl",
            checkpoint_minutes=config.checkpoint_minutes,
            amount=config.batch_size,
            unit="examples",
            ranks=ranks or Ranks(),
            log=log,
        )
        self.backbone, self.tasks, self.config = backbone, tasks, config
        self.inputs = dict(inputs or {})  # what the run was asked for: kept in config.json and the model card
        self.pad_id = backbone.tokenizer.pad_id
        prompts = ModularPrompts(self._meta(init), torch.Generator().manual_seed(config.seed))
        self._init = None if init is None else [init.sha256, *init.meta.tasks]
        if config.method != "mp2":
            begin_single(prompts, backbone, config.seed)
        if init is not None:
            start_from(prompts, init)
        encoder = backbone.encoder
        elsewhere = encoder.word_embeddings.weight.device != self.ranks.device
        if config.backbone_lr > 0 or elsewhere:  # the caller's backbone must stay what and where it is
            encoder = copy.deepcopy(encoder)
        self.model = PromptedEncoder(encoder, prompts).to(self.ranks.device)
        self.model.encoder.requires_grad_(config.backbone_lr > 0)
        slow = [prompts.z, prompts.projection, prompts.span_weight, prompts.span_bias]
        parts = (("router", [prompts.routers]), ("prompts", slow))
        groups: list[dict[str, Any]] = []
        for name, parameters in parts:
            if trained := [p for p in parameters if p.requires_grad]:  # one soft prompt has no router
                groups.append({"name": name, "params": trained})
        if config.backbone_lr > 0:
            groups.append({"name": "backbone", "params": list(self.model.encoder.parameters())})
        self.optimizer = torch.optim.Adam(groups, lr=1e-3, fused=True)
        self._on_ranks = self.ranks.wrap(self.model)
        self.before: dict[str, float] = {}

    def _meta(self, init: PromptSet | None) -> PromptMeta:
        config = self.config
        names = tuple(task.card.task for task in self.tasks)
        if init is not None:
            for line in differences(init, self.backbone, config):
                self.log(f"note: {line}; they are only a starting point here")
        return new_meta(
            self.backbone.name,
            self.backbone.sha256,
            self.backbone.encoder,
            config.kind,
            n_modules=config.n_modules,
            prompt_tokens=config.prompt_tokens,
            intrinsic_dim=config.intrinsic_dim,
            injection=config.injection,
            router_inference=config.router_inference,
            router_normalisation=config.router_normalisation,
            tasks=names,
            provenance={
                "made_by": "mp2 pretrain",
                "config": asdict(config),
                **({} if config.method == "mp2" else {"method": config.method}),
            },
        )

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed; how often one is written does not matter."""
        settings = asdict(self.config)
        del settings["checkpoint_minutes"]
        if self.config.method == "mp2":
            del settings["method"]  # which came later: older checkpoints can be resumed
        tasks = [task.card.task for task in self.tasks]
        return {
            **settings,
            "tasks": tasks,
            **self._data_sha256,
            "backbone": self.backbone.sha256,
            "init": self._init,
        }

    @cached_property
    def _data_sha256(self) -> dict[str, list[str]]:
        """Hashes of each task's data; every checkpoint has them, so they are computed once."""
        return {
            "train_data": [task.train_sha256() for task in self.tasks],
            "dev_data": [task.dev_sha256() for task in self.tasks],
        }

    def state(self) -> dict[str, Any]:
        """Dev scores before the first step."""
        return {"before": self.before}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state`` gave."""
        before = check(state, Fields({"before": object_of(number(0, 1))}), self.checkpoint)["before"]
        if before.keys() != {task.card.task for task in self.tasks}:
            raise FormatError(f"has scores of {shown(sorted(before))}", path=self.checkpoint, field="before")
        self.before = before

    def make_batch(self, step: int) -> Batch:
        """This process's rows of the batch of a step."""
        config = self.config
        whole = sample_batch(
            self.tasks, step, batch_size=config.batch_size, seed=config.seed, pad_id=self.pad_id
        )
        return whole.part(self.ranks.rank, self.ranks.size)

    def loss(self, batch: Batch) -> Tensor:
        """This process's share of the batch's mean span loss, under router noise that all processes share."""
        seed = np.random.default_rng([self.config.seed, 4, self.step]).integers(2**62)
        noise = torch.Generator().manual_seed(int(seed))
        device = self.ranks.device
        with in_precision(device, self.config.precision):
            temperature = self.config.temperature_at(self.step)
            loss: Tensor = self._on_ranks(batch.to(device), temperature, noise)
        return loss

    def clip(self) -> Tensor:
        """Limit the backbone's gradients, if it is trained, to norm 1; the prompts' stay as they are."""
        gradients = [p.grad for p in self.model.prompts.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.config.backbone_lr > 0:
            norm = norm + nn.utils.clip_grad_norm_(self.model.encoder.parameters(), 1.0)
        return norm

    def rates(self) -> list[float]:
        """Learning rates of routers, prompts and, if it is trained, the backbone."""
        share = self.config.rate_share(self.step)
        router, prompts = self.config.rates
        rates = {"router": router, "prompts": prompts, "backbone": self.config.backbone_lr}
        return [share * rates[group["name"]] for group in self.optimizer.param_groups]

    def notes(self, batch: Batch) -> dict[str, Any]:
        """The batch's task."""
        return {"task": self.tasks[batch.task].card.task}

    def more_scalars(self) -> dict[str, float]:
        """The routers' temperature."""
        return {"train/temperature": self.config.temperature_at(self.step - 1)}

    def dev_scores(self) -> dict[str, float]:
        """Dev metric of every task under its own inference router."""
        return dev_scores(self.model, self.tasks, self.pad_id, self.ranks)

    def after_step(self) -> None:
        """Score dev every ``eval_every`` steps; the last step's scores come with the results."""
        every = self.config.eval_every
        if not every or self.step % every or self.step == self.n_steps:
            return
        now = self.dev_scores()
        if self.ranks.main:
            self._note_scores(self.step, now)
            both = {name: {"before": self.before[name], "now": now[name]} for name in now}
            self.log(f"dev at step {self.step}\n{table(both)}")

    def _note_scores(self, step: int, scores: Mapping[str, float]) -> None:
        with open_to_append(self.out / "dev_scores.jsonl") as file:
            write_all(file, journal_line({"step": step, "scores": scores}))
        if self.scalars is not None:
            mean = {"dev/mean": float(np.mean(list(scores.values())))}
            self.scalars.add(step, {**{f"dev/{name}": s for name, s in scores.items()}, **mean})

    def run(self) -> PretrainResult:
        """Train to the end, from the checkpoint if there is one, and write prompts, scores and losses.

        Raises:
            RunLockedError: another process trains in the same folder.
            LossError: ten non-finite losses in a row.
        """
        with alone_in(self.out) if self.ranks.main else nullcontext(), self.resumed() as resumed:
            if not resumed:
                self.before = self.dev_scores()
            if self.ranks.main:
                last = min(self.step, self.n_steps - 1) if resumed else -1  # of the scores that are kept
                scored = range(0, last + 1, self.config.eval_every or self.n_steps)
                cut_back(self.out / "dev_scores.jsonl", last, scored, self.log, SCORES_LINE)
                if not resumed:
                    self._note_scores(0, self.before)
                said = asdict(self.config) | ({"inputs": self.inputs} if self.inputs else {})
                write_json(self.out / "config.json", said, indent=1)
            self.train()
            return self._finish()

    def _finish(self) -> PretrainResult:
        after = self.dev_scores()
        scores = {name: {"before": self.before[name], "after": after[name]} for name in after}
        prompts = self.model.prompts.to_set()
        backbone = self.backbone
        if self.config.backbone_lr > 0:
            encoder = self.model.encoder.cpu()
            backbone = freeze(encoder.config, encoder, self.backbone.tokenizer)
            names = {"backbone": str(self.out / "backbone"), "backbone_sha256": backbone.sha256}
            meta = PromptMeta(**{**asdict(prompts.meta), **names})
            prompts = PromptSet(meta=meta, **{n: getattr(prompts, n) for n in meta.shapes()})
        elif weights_sha256(self.model.encoder) != self.backbone.sha256:
            raise MismatchError("the frozen backbone's weights changed during training; this is a bug in mp2")
        result = PretrainResult(prompts, backbone, scores, self.skipped, self.seconds, self.wait_share)
        if self.ranks.main:
            if self.config.backbone_lr > 0:
                save_backbone(backbone, self.out / "backbone")
            self._note_scores(self.n_steps, after)
            save_prompts(prompts, self.out / "prompts.safetensors")
            write_outputs(self.out, result, self.backbone, self.tasks, self.config, self.ranks, self.inputs)
        return result


def differences(init: PromptSet, backbone: Backbone, config: PretrainConfig) -> list[str]:
    """What differs between this run and the one that made its first prompts, a line each.

    Raises:
        MismatchError: these prompts are of another shape.
    """
    meta, shape = init.meta, backbone.config
    if (meta.n_layers, meta.hidden) != (shape.n_layers, shape.hidden):
        raise MismatchError(
            f"--init prompts are for {meta.n_layers} layers of hidden size {meta.hidden}, "
            f"backbone '{shape.name}' has {shape.n_layers} of {shape.hidden}"
        )
    got = (meta.n_modules, meta.prompt_tokens, meta.intrinsic_dim, meta.kind)
    expected = (config.n_modules, config.prompt_tokens, config.intrinsic_dim, config.kind)
    if got != expected:
        raise MismatchError(f"--init prompts have (K, m, d, kind) = {got}, this run has {expected}")
    lines = []
    if meta.backbone_sha256 != backbone.sha256:
        lines.append(
            f"--init prompts were trained on '{meta.backbone}' with weights {meta.backbone_sha256[:12]}; "
            f"'{backbone.name}' has the same shape but weights {backbone.sha256[:12]}"
        )
    if config.n_inline != meta.n_inline:
        lines.append(f"--init prompts were trained with {meta.injection} injection")
    routers = (meta.router_inference, meta.router_normalisation)
    if routers != (config.router_inference, config.router_normalisation):
        lines.append("--init prompts were trained for {} routers divided by the {}".format(*routers))
    return lines


def start_from(prompts: ModularPrompts, init: PromptSet) -> None:
    """Copy z, A, head, and the routers of the tasks that both have."""
    with torch.no_grad():
        for name in ("z", "projection", "span_weight", "span_bias"):
            getattr(prompts, name).copy_(getattr(init, name))
        for i, task in enumerate(prompts.meta.tasks):
            if task in init.meta.tasks:
                prompts.routers[i] = init.routers[init.meta.tasks.index(task)]

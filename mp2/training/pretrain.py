"""Multi-task pre-training of modular prompts and routers over a frozen backbone.

Paper section 3.3, appendix A.1.

With ``backbone_lr`` above zero the backbone's own weights are trained too, beside the prompts: the second
backbone stage that a small masked language model needs before prompts alone can steer it. Whoever uses it
says so in the model card; the result is a new backbone with its own hash.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mp2.backbone.device import resolve_device
from mp2.backbone.encoder import Encoder
from mp2.backbone.load import Backbone, freeze, load_backbone, save_backbone, weights_sha256
from mp2.errors import LossError, MismatchError, UsageError
from mp2.prompts import ModularPrompts, PromptMeta, PromptSet, load_prompts, new_meta, save_prompts
from mp2.tasks import TaskCard, decode, list_cards, load_card, score
from mp2.tasks.data import has_split
from mp2.training.checkpoint import alone_in, load_checkpoint, save_checkpoint
from mp2.training.journal import drop_lines_after
from mp2.training.mixture import MixtureTask, load_mixture, pad, sample_batch
from mp2.training.stop import StopSignals

MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything needed to run a pre-training again; defaults are the paper's (section 4.2, appendix A.1)."""

    kind: Literal["deep", "shallow"] = "deep"
    n_modules: int = 8
    prompt_tokens: int = 50
    intrinsic_dim: int = 300
    steps: int = 1_000_000
    batch_size: int = 32
    router_lr: float | None = None  # None: 5e-4 deep, 1e-3 shallow
    prompt_lr: float | None = None  # None: 1e-4 deep, 1e-3 shallow (fast and slow learning)
    backbone_lr: float = 0.0  # 0: frozen
    schedule: Literal["constant", "linear"] = "constant"
    warmup_steps: int = 0
    temperature: float = 1.0
    max_tokens: int = 512
    rotated: bool = False  # also every classification task with the next option as its answer (ours)
    shuffle_options: bool = False  # options of a training example in an order of its own (ours)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    dev_limit: int = 300
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("n_modules", "prompt_tokens", "intrinsic_dim", "steps", "batch_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.temperature <= 0:
            raise UsageError(f"temperature is {self.temperature}, expected a positive number")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"precision is '{self.precision}', expected fp32 or bf16")
        for name in ("router_lr", "prompt_lr", "backbone_lr"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"{name} is {value}, expected 0 <= rate < 1")

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates (router, prompts): the paper's unless given."""
        router, prompts = (5e-4, 1e-4) if self.kind == "deep" else (1e-3, 1e-3)
        return (
            router if self.router_lr is None else self.router_lr,
            prompts if self.prompt_lr is None else self.prompt_lr,
        )


class PromptedEncoder(nn.Module):
    """A backbone with modular prompts on it; ``encoder`` may be frozen."""

    def __init__(self, encoder: Encoder, prompts: ModularPrompts) -> None:
        super().__init__()
        self.encoder = encoder
        self.prompts = prompts


@dataclass(frozen=True)
class PretrainResult:
    """Prompts, the backbone they belong to, and dev scores of each task before and after."""

    prompts: PromptSet
    backbone: Backbone
    scores: dict[str, dict[str, float]]
    skipped_steps: int


def span_loss(start_logits: Tensor, end_logits: Tensor, mask: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Mean over the batch of (start + end cross-entropy) / 2 over the real positions; padding is masked."""
    start_logits = start_logits.float().masked_fill(~mask, -torch.inf)
    end_logits = end_logits.float().masked_fill(~mask, -torch.inf)
    return (F.cross_entropy(start_logits, start) + F.cross_entropy(end_logits, end)) / 2


@torch.no_grad()
def dev_score(
    model: PromptedEncoder, task: MixtureTask, weights: Tensor, pad_id: int, batch: int = 64
) -> float:
    """Metric of a task on its dev examples under router weights [L', K]; between 0 and 1."""
    device = weights.device
    order = np.argsort([x.n_tokens for x in task.dev], kind="stable")
    starts: list[Any] = [None] * len(order)
    ends: list[Any] = [None] * len(order)
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        ids, mask_np = pad([task.dev[i] for i in rows], pad_id)
        mask = torch.from_numpy(mask_np).to(device)
        logits = model.prompts(model.encoder, torch.from_numpy(ids).to(device), mask, weights)
        start, end = (x.float().masked_fill(~mask, -torch.inf).log_softmax(-1).cpu().numpy() for x in logits)
        for row, i in enumerate(rows):
            n = task.dev[i].n_tokens
            starts[i], ends[i] = start[row, :n], end[row, :n]
    return score(task.card, decode(task.card, task.dev_examples, task.dev, starts, ends), task.dev_examples)


class Pretrainer:
    """One pre-training run in one folder: sampling, steps, checkpoints, dev scores."""

    def __init__(
        self,
        backbone: Backbone,
        tasks: Sequence[MixtureTask],
        config: PretrainConfig,
        out: Path,
        *,
        init: PromptSet | None = None,
        device: torch.device | None = None,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.backbone, self.tasks, self.config, self.out, self.log = backbone, tasks, config, out, log
        self.device = device or torch.device("cpu")
        self.pad_id = backbone.tokenizer.pad_id
        meta = self._meta(init)
        prompts = ModularPrompts(meta, torch.Generator().manual_seed(config.seed))
        if init is not None:
            start_from(prompts, init)
        encoder = backbone.encoder
        if config.backbone_lr > 0:  # the caller's backbone must stay what its hash says
            encoder = copy.deepcopy(encoder)
        self.model = PromptedEncoder(encoder, prompts).to(self.device)
        self.model.encoder.requires_grad_(config.backbone_lr > 0)
        router_lr, prompt_lr = config.rates
        groups: list[dict[str, Any]] = [
            {"params": [prompts.routers], "base_lr": router_lr},
            {
                "params": [prompts.z, prompts.projection, prompts.span_weight, prompts.span_bias],
                "base_lr": prompt_lr,
            },
        ]
        if config.backbone_lr > 0:
            groups.append({"params": list(self.model.encoder.parameters()), "base_lr": config.backbone_lr})
        self.optimizer = torch.optim.Adam(groups, lr=1e-3)
        self.step = 0
        self.skipped = 0
        self.in_a_row = 0
        self.before: dict[str, float] = {}

    def _meta(self, init: PromptSet | None) -> PromptMeta:
        config = self.config
        names = tuple(task.card.task for task in self.tasks)
        if init is not None:
            shape = self.backbone.config
            if (init.meta.n_layers, init.meta.hidden) != (shape.n_layers, shape.hidden):
                raise MismatchError(
                    f"--init prompts are for {init.meta.n_layers} layers of hidden size {init.meta.hidden}, "
                    f"backbone '{shape.name}' has {shape.n_layers} of {shape.hidden}"
                )
            got = (init.meta.n_modules, init.meta.prompt_tokens, init.meta.intrinsic_dim, init.meta.kind)
            expected = (config.n_modules, config.prompt_tokens, config.intrinsic_dim, config.kind)
            if got != expected:
                raise MismatchError(f"--init prompts have (K, m, d, kind) = {got}, this run has {expected}")
        return new_meta(
            self.backbone.name,
            self.backbone.sha256,
            self.backbone.encoder,
            config.kind,
            n_modules=config.n_modules,
            prompt_tokens=config.prompt_tokens,
            intrinsic_dim=config.intrinsic_dim,
            tasks=names,
            provenance={"made_by": "mp2 pretrain", "config": asdict(config)},
        )

    @property
    def checkpoint(self) -> Path:
        """The run's only checkpoint file."""
        return self.out / "checkpoint.safetensors"

    def settings(self) -> str:
        """What a checkpoint must agree on to be resumed."""
        tasks = [(t.card.task, len(t.train)) for t in self.tasks]
        trained = self.config.backbone_lr > 0
        backbone = None if trained else self.backbone.sha256
        return json.dumps([asdict(self.config), tasks, backbone], sort_keys=True)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "before": self.before,
            "settings": self.settings(),
        }
        save_checkpoint(self.checkpoint, self.model, self.optimizer, state)

    def resume(self) -> bool:
        """Go back to the folder's checkpoint if there is one."""
        if not self.checkpoint.is_file():
            return False
        state = load_checkpoint(self.checkpoint, self.model, self.optimizer)
        if state["settings"] != self.settings():
            raise MismatchError(
                f"{self.checkpoint} was made with other settings, data or backbone; "
                "give the same ones, or another --out"
            )
        self.step, self.skipped, self.in_a_row = state["step"], state["skipped"], state["in_a_row"]
        self.before = state["before"]
        return True

    def train_step(self) -> float:
        """One step; returns its loss. A non-finite loss is skipped and counted."""
        config = self.config
        batch = sample_batch(
            self.tasks,
            self.step,
            batch_size=config.batch_size,
            seed=config.seed,
            pad_id=self.pad_id,
            device=self.device,
        )
        rate = self._schedule()
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        noise_seed = np.random.default_rng([config.seed, 4, self.step]).integers(2**62)
        noise = torch.Generator().manual_seed(int(noise_seed))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            weights = self.model.prompts.router_weights(
                batch.task, temperature=config.temperature, generator=noise
            )
            start, end = self.model.prompts(self.model.encoder, batch.input_ids, batch.mask, weights)
            loss = span_loss(start, end, batch.mask, batch.start, batch.end)
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()  # type: ignore[no-untyped-call]
            if config.backbone_lr > 0:
                nn.utils.clip_grad_norm_(self.model.encoder.parameters(), 1.0)
            self.optimizer.step()
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
            if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise LossError(
                    f"{self.in_a_row} non-finite losses in a row at step {self.step}; "
                    f"the last good checkpoint is {self.checkpoint}"
                )
        self.step += 1
        return value

    def _schedule(self) -> float:
        config = self.config
        ramp = min(1.0, (self.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.schedule == "linear":
            ramp = min(ramp, (config.steps - self.step) / max(1, config.steps - config.warmup_steps))
        return ramp

    def dev_scores(self) -> dict[str, float]:
        """Dev metric of every task under its own inference router."""
        self.model.eval()
        scores = {}
        for i, task in enumerate(self.tasks):
            weights = self.model.prompts.router_weights(i).detach()
            scores[task.card.task] = dev_score(self.model, task, weights, self.pad_id)
        return scores

    def run(self) -> PretrainResult:
        """Train to the end, from the checkpoint if there is one, and write prompts, scores and losses.

        Raises:
            RunLockedError: another process trains in the same folder.
            LossError: ten non-finite losses in a row.
        """
        with alone_in(self.out):
            return self._run()

    def _run(self) -> PretrainResult:
        if self.resume():
            self.log(f"resumed at step {self.step}")
        else:
            self.before = self.dev_scores()
        (self.out / "config.json").write_text(json.dumps(asdict(self.config), indent=1) + "\n")
        losses_file = self.out / "losses.jsonl"
        drop_lines_after(losses_file, self.step)
        started = last_log = last_save = time.monotonic()
        first, recent = self.step, list[float]()
        with losses_file.open("a") as losses, StopSignals() as stop:
            while self.step < self.config.steps:
                value = self.train_step()
                if math.isfinite(value):
                    recent.append(value)
                line = {"step": self.step, "loss": value if math.isfinite(value) else None}
                losses.write(json.dumps(line) + "\n")
                now = time.monotonic()
                if now - last_log > 20 or self.step == self.config.steps:
                    pace = (self.step - first) / (now - started)
                    eta = (self.config.steps - self.step) / pace / 60
                    mean = float(np.mean(recent)) if recent else math.nan
                    self.log(
                        f"step {self.step}/{self.config.steps} loss {mean:.4f} "
                        f"{pace:.2f} steps/s ETA {eta:.1f} min"
                    )
                    recent, last_log = [], now
                due = now - last_save > self.config.checkpoint_minutes * 60 or self.step == self.config.steps
                if due or stop.received:
                    losses.flush()
                    self.save()
                    last_save = now
                if stop.received:
                    self.log(f"stopped at step {self.step}; the same command goes on from there")
                    stop.leave()
        return self._finish()

    def _finish(self) -> PretrainResult:
        after = self.dev_scores()
        scores = {name: {"before": self.before[name], "after": after[name]} for name in after}
        (self.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
        prompts = self.model.prompts.to_set()
        backbone = self.backbone
        if self.config.backbone_lr > 0:
            encoder = self.model.encoder.cpu()
            backbone = freeze(encoder.config, encoder, self.backbone.tokenizer)
            save_backbone(backbone, self.out / "backbone")
            names = {"backbone": str(self.out / "backbone"), "backbone_sha256": backbone.sha256}
            meta = PromptMeta(**{**asdict(prompts.meta), **names})
            prompts = PromptSet(meta=meta, **{n: getattr(prompts, n) for n in meta.shapes()})
        elif weights_sha256(self.model.encoder) != self.backbone.sha256:
            raise MismatchError("the frozen backbone's weights changed during training; this is a bug in mp2")
        save_prompts(prompts, self.out / "prompts.safetensors")
        return PretrainResult(prompts, backbone, scores, self.skipped)


def start_from(prompts: ModularPrompts, init: PromptSet) -> None:
    """Copy z, A, head, and the routers of the tasks that both have."""
    with torch.no_grad():
        for name in ("z", "projection", "span_weight", "span_bias"):
            getattr(prompts, name).copy_(getattr(init, name))
        for i, task in enumerate(prompts.meta.tasks):
            if task in init.meta.tasks:
                prompts.routers[i] = init.routers[init.meta.tasks.index(task)]


def pretrain(
    cards: Sequence[TaskCard],
    backbone: Backbone,
    config: PretrainConfig,
    out: Path,
    *,
    data: Path | None = None,
    init: PromptSet | None = None,
    device: str = "cpu",
    log: Callable[[str], None] = lambda _: None,
) -> PretrainResult:
    """Pre-train prompts for ``cards`` over ``backbone`` in the folder ``out``; see ``Pretrainer``."""
    where = resolve_device(device)
    limit = min(config.max_tokens, backbone.config.max_positions)
    if config.kind == "shallow":  # inline rows take positions too
        limit = min(config.max_tokens, backbone.config.max_positions - config.prompt_tokens)
    tasks = load_mixture(
        cards,
        data,
        backbone.tokenizer,
        limit,
        dev_limit=config.dev_limit,
        rotated=config.rotated,
        shuffle_options=config.shuffle_options,
        seed=config.seed,
        log=log,
    )
    n_train = sum(len(t.train) for t in tasks)
    log(f"{len(tasks)} tasks, {n_train:,} training sequences")
    return Pretrainer(backbone, tasks, config, out, init=init, device=where, log=log).run()


def pretrain_command(
    names: Sequence[str],
    backbone_name: str,
    config: PretrainConfig,
    out: str,
    data: str | None,
    init: str | None,
    device: str,
    threads: int | None,
    *,
    log: Callable[[str], None],
) -> PretrainResult:
    """What ``mp2 pretrain`` does: resolve names, load, train.

    Without names, every task that has training data in the data folder.
    """
    if threads:
        torch.set_num_threads(threads)
    backbone = load_backbone(backbone_name)
    root = Path(data) if data else None
    cards = [load_card(name) for name in names]
    if not cards:
        cards = [card for card in list_cards() if has_split(card, "train", root)]
        if not cards:
            raise UsageError("no task has training data; pass --data DIR (DIR/<task>/train.jsonl) or --tasks")
    prompts = load_prompts(init) if init else None
    return pretrain(cards, backbone, config, Path(out), data=root, init=prompts, device=device, log=log)


def score_table(result: PretrainResult) -> str:
    """Dev scores before and after, a line a task, best gain first."""
    rows = sorted(result.scores.items(), key=lambda item: item[1]["before"] - item[1]["after"])
    lines = [f"{'task':20} {'before':>7} {'after':>7}"]
    lines += [f"{name:20} {100 * s['before']:7.1f} {100 * s['after']:7.1f}" for name, s in rows]
    mean = [float(np.mean([s[key] for _, s in rows])) for key in ("before", "after")]
    lines.append(f"{'mean':20} {100 * mean[0]:7.1f} {100 * mean[1]:7.1f}")
    if result.skipped_steps:
        lines.append(f"{result.skipped_steps} steps had a non-finite loss and were skipped")
    return "\n".join(lines)

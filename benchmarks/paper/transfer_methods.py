"""What a cell of the transfer table runs: one method on one task with one seed.

========  ============================================================================================
deep      ``mp2 bbt``: router search, then CMA-ES layer by layer, from the pre-trained deep prompts
shallow   the same with shallow prompts
bbtv2     ``mp2 bbt --router-search none`` on ``mp2 scratch --like DEEP``: BBTv2, nothing pre-trained
bbt       the same with shallow prompts: BBT
gradient  ``mp2 tune``: both stages by Adam, deep; ``gradient-shallow`` with shallow prompts
majority  no model: the test set's most frequent label or option; in extraction the whole context
========  ============================================================================================

Ablations. ``*-inline`` has inline rows at every layer where the plain method has prefixes: ``deep-inline``
and ``gradient-inline`` need deep prompts pre-trained inline (a further file in --prompts;
``benchmarks/ablation.py`` makes one), ``bbtv2-inline`` is from scratch and does not. ``gradient-scratch`` and
``gradient-scratch-inline`` are prompt tuning by Adam, nothing pre-trained: one module, no router, all epochs
for the prompts. ``*-sum`` divides a router by its sum instead of K, with prompts that were pre-trained so
where such a file is given, else with the deep or shallow ones; ``gradient-soft`` uses sigmoid weights instead
of w > 0 at inference (training is on soft samples either way).

The baselines keep the span head of the pre-trained prompts (see ``mp2/training/scratch.py``), which favours
them. One deep run also gives "untuned" and "router-only": they are its first two stages, with the same seed
and search as ``mp2 bbt --router-only`` would have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

from mp2.backbone import load_backbone
from mp2.engine import create_backend
from mp2.errors import UsageError
from mp2.optimizers.config import LayerConfig
from mp2.prompts import PromptSet, load_prompts, save_prompts
from mp2.runs import BbtConfig, RouterConfig, resume_run, start_run
from mp2.runs.frozen_model import FrozenModel
from mp2.runs.scratch import untrained_prompts
from mp2.tasks import MrcFormatter, TaskCard, load_card, load_examples, score
from mp2.training.config import TuneConfig
from mp2.training.tune_run import start_tune

DEFAULT_METHODS = ("majority", "deep", "bbtv2", "shallow", "bbt", "gradient")
METHODS = (
    *DEFAULT_METHODS,
    *("gradient-shallow", "gradient-scratch", "deep-sum", "shallow-sum", "gradient-sum", "gradient-soft"),
    *("deep-inline", "bbtv2-inline", "gradient-inline", "gradient-scratch-inline"),
)
PAPER_EPOCHS = 1000
SCRATCH_LR = 1e-3  # of prompt tuning, for as many; the paper's 2e-5 is for prompts that are nearly right
SCRATCH_ALPHA = 0.1  # its first prompts' standard deviation, in that of the layer's hidden states


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all cells of a table share."""

    backbone: str
    prompts: tuple[str, ...]  # one file for each of `prompts_key`
    iters: int
    epochs: int
    test_limit: int
    max_tokens: int
    device: str = "cpu"
    precision: str = "fp32"


def kind_of(method: str) -> Literal["deep", "shallow", "inline"]:
    """Which prompts a method takes its own, or its shape and head, from."""
    if method == "bbt" or "shallow" in method:
        return "shallow"
    return "inline" if method in ("deep-inline", "gradient-inline") else "deep"


def prompts_key(prompts: PromptSet) -> str:
    """What a prompt file is for: ``shallow``, ``deep``, ``inline`` (deep) or ``sum`` (deep prefix)."""
    if prompts.kind == "shallow":
        return "shallow"
    if prompts.meta.injection == "inline":
        return "inline"
    return "sum" if prompts.meta.router_normalisation == "sum" else "deep"


def random_start(prompts: PromptSet, seed: int) -> PromptSet:
    """Scratch prompts with z from N(0, sigma) instead of 0: the first population of BBTv2 has such ones.

    Prefix rows that start alike have the same gradients and would stay alike for ever.
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(prompts.z.shape, generator=generator)
    sigmas = [LayerConfig().sigma(layer, "deep") for layer in range(len(z))]
    return replace(prompts, z=z * torch.tensor(sigmas)[:, None, None])


class Lab:
    """Backbone, prompts and runtime, loaded once; runs cells."""

    def __init__(self, settings: Settings, data: Path, work: Path) -> None:
        self.settings, self.data, self.work = settings, data, work
        self.backbone = load_backbone(settings.backbone)
        self.prompts: dict[str, tuple[str, PromptSet]] = {}
        for name in settings.prompts:
            found = load_prompts(name, self.backbone)
            key = prompts_key(found)
            if key in self.prompts:
                raise UsageError(f"--prompts: both {self.prompts[key][0]} and {name} are {key}")
            self.prompts[key] = (name, found)
        self.runtime = create_backend(
            "torch", self.backbone, device=settings.device, threads=1, precision=settings.precision
        )

    def check(self, methods: Sequence[str]) -> None:
        """Raise ``UsageError`` if a method needs prompts that were not given."""
        for method in methods:
            kind = kind_of(method)
            if method != "majority" and kind not in self.prompts:
                raise UsageError(f"method '{method}' needs {kind} prompts: name a file of them in --prompts")

    def identity(self) -> dict[str, str]:
        """Hashes of the weights that scores depend on."""
        sets = {f"prompts_{kind}": found.sha256 for kind, (_, found) in self.prompts.items()}
        return {"backbone": self.backbone.sha256, **sets}

    def refusal(self, card: TaskCard) -> str | None:
        """Why the task's options do not fit a sequence, if they do not."""
        try:
            MrcFormatter(card, self.backbone.tokenizer, self.settings.max_tokens)
        except UsageError as error:
            return (
                f"{error}; backbone '{self.backbone.name}' has {self.backbone.config.max_positions} positions"
            )
        return None

    def run(self, method: str, task: str, seed: int) -> dict[str, Any]:
        """The cell's result: test scores by stage."""
        if method == "majority":
            return {"stages": {"final": {"test_score": self.majority(task)}}}
        name, prompts = self._prompts(method, seed)
        config = BbtConfig(
            task=task,
            data=str(self.data),
            backbone=self.settings.backbone,
            prompts=name,
            iters=self.settings.iters,
            router=RouterConfig(method="none") if method.startswith("bbt") else RouterConfig(),
            seed=seed,
            max_tokens=self.settings.max_tokens,
            test_limit=self.settings.test_limit,
            runtime="torch",
            device=self.settings.device,
            precision=self.settings.precision,
            threads=1,
        )
        model = FrozenModel(self.backbone, prompts, self.runtime)
        folder = self.work / "runs" / Path(task).stem / f"{method}-seed{seed}"
        if not method.startswith("gradient"):
            for run in sorted(folder.glob("*/")):
                if (run / "journal.jsonl").is_file():
                    return resume_run(run)
            return start_run(config, folder, model=model)
        first = TuneConfig(run=config, epochs=self.settings.epochs)
        scale = PAPER_EPOCHS / first.epochs  # fewer epochs, larger steps: Adam can go as far as in the paper
        if "scratch" in method:
            tuned = replace(first, router_epochs=0, prompt_lr=SCRATCH_LR * scale)
            return start_tune(tuned, folder, model=model)
        router_lr, prompt_lr = (rate * scale for rate in first.rates(model.kind))
        return start_tune(replace(first, router_lr=router_lr, prompt_lr=prompt_lr), folder, model=model)

    def majority(self, task: str) -> float:
        """Score of the best constant answer on the test examples; extraction: of the whole context."""
        card = load_card(task)
        tests = load_examples(card, "test", self.data, self.settings.test_limit)
        if card.type == "extraction":
            return score(card, [e.fields["context"] for e in tests], tests)
        most = Counter(e.label for e in tests).most_common(1)[0][0]
        assert most is not None
        return score(card, [most] * len(tests), tests)

    def _prompts(self, method: str, seed: int) -> tuple[str, PromptSet]:
        """The method's prompts and the name of their file; derived ones are written to the work folder."""
        key: str = kind_of(method)
        if method in ("deep-sum", "gradient-sum") and "sum" in self.prompts:
            key = "sum"
        name, prompts = self.prompts[key]
        file = self.work / "prompts" / f"{method}-seed{seed}.safetensors"
        if method.startswith("bbt"):
            made = untrained_prompts(self.backbone, prompts, seed=seed)
        elif "scratch" in method:
            made = random_start(
                untrained_prompts(self.backbone, prompts, seed=seed, alpha=SCRATCH_ALPHA), seed
            )
        elif method.endswith("-sum") and key != "sum":
            made = replace(prompts, meta=replace(prompts.meta, router_normalisation="sum"))
        elif method.endswith("-soft"):
            made = replace(prompts, meta=replace(prompts.meta, router_inference="soft"))
        else:
            return name, prompts
        if method in ("bbtv2-inline", "gradient-scratch-inline"):
            made = replace(made, meta=replace(made.meta, injection="inline"))
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                save_prompts(made, file)
        return str(file), made

"""What a cell of Table 3 runs: one method on one task with one seed.

==============  ======================================================================================
deep            ``mp2 bbt``: router search, then CMA-ES layer by layer, from the pre-trained deep prompts
shallow         the same with shallow prompts
gradient        ``mp2 tune``: both stages by Adam, deep; ``gradient-shallow`` with shallow prompts
model-tuning, prompt-tuning, p-tuning-v2    ``mp2 tune --method ...``, from random starts
spot, ppt       prompt tuning from the single prompt of a file in --prompts, if there is one
bbt, bbtv2      ``mp2 bbt --method ...``: as published; the checkpoint's own head, label words
majority        no model: the test set's most frequent label or option; in extraction the whole context
simple          TF-IDF and a linear probe of the backbone on the same examples (``mp2 baselines``)
==============  ======================================================================================

BBT and BBTv2 with a *span head*, in the place and injection of MP2's prompts, on random projections:
``bbtv2-mp2-head`` has the head of the pre-trained prompts, ``bbtv2-upstream-head`` one that was trained
upstream without prompts (a file of ``mp2 pretrain --method head`` in --prompts), ``bbtv2-tuned-head`` a
random one that was first tuned on the few-shot examples; ``bbt-...`` the same, shallow. They differ by what
the head has seen: no prompt of theirs was pre-trained.

Ablations. ``*-inline`` has inline rows at every layer where the plain method has prefixes: ``deep-inline``
and ``gradient-inline`` need deep prompts pre-trained inline (a further file in --prompts;
``benchmarks/paper/ablation.py`` makes one), ``bbtv2-inline`` (MP2's head) is from scratch and does not.
``gradient-scratch`` and ``gradient-scratch-inline`` are prompt tuning by Adam with MP2's head: one module, no
router, all epochs for the prompts. ``*-sum`` divides a router by its sum instead of K, with prompts that were
pre-trained so where such a file is given, else with the deep or shallow ones; ``gradient-soft`` uses sigmoid
weights instead of w > 0 at inference (training is on soft samples either way).

One deep run also gives "untuned" and "router-only": they are its first two stages, with the same seed and
search as ``mp2 bbt --router-only`` would have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from mp2.backbone import load_backbone
from mp2.engine import create_backend
from mp2.errors import UsageError
from mp2.optimizers.config import LayerConfig
from mp2.prompts import PromptSet, load_prompts, save_prompts
from mp2.prompts.scratch import with_head
from mp2.runs import BbtConfig, RouterConfig, resume_run, start_run
from mp2.runs.curve import read_curve
from mp2.runs.frozen_model import FrozenModel
from mp2.runs.pooled_states import pooled_states
from mp2.runs.scratch import made_on_the_fly, untrained_prompts
from mp2.tasks import MrcFormatter, TaskCard, few_shot_split, load_card, load_examples, score
from mp2.tasks.baselines import baselines
from mp2.training.config import TuneConfig
from mp2.training.methods import METHODS as TUNE
from mp2.training.methods.method import no_rows
from mp2.training.tune_run import start_tune

DEFAULT_METHODS = (
    *("majority", "simple", "model-tuning", "prompt-tuning", "p-tuning-v2", "ppt", "spot"),
    *("gradient-shallow", "gradient", "bbt", "bbtv2", "shallow", "deep"),
    *("bbtv2-mp2-head", "bbtv2-upstream-head", "bbtv2-tuned-head"),
)
METHODS = (
    *DEFAULT_METHODS,
    *("bbt-mp2-head", "bbt-upstream-head", "bbt-tuned-head"),
    *("gradient-scratch", "deep-sum", "shallow-sum", "gradient-sum", "gradient-soft"),
    *("deep-inline", "bbtv2-inline", "gradient-inline", "gradient-scratch-inline"),
)
OF_TUNE = ("model-tuning", "prompt-tuning", "p-tuning-v2", "spot", "ppt")
PUBLISHED = ("bbt", "bbtv2")
UNTUNED = ("majority", "simple")  # no steps: what they take hardly depends on the test examples
ALONE = (*UNTUNED, *PUBLISHED)  # what needs no prompt file
PAPER_EPOCHS = 1000
MOST = 0.5  # of a learning rate, however few the epochs
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
    training_precision: str = "fp32"
    dev_every: int | None = None  # of black-box tuning; None: its own choice


def kind_of(method: str) -> str:
    """Which prompts a method takes its own, or its shape and head, from: a `prompts_key`."""
    if method in ("spot", "ppt"):
        return method
    if method.startswith("bbt-") or "shallow" in method or method == "prompt-tuning":
        return "shallow"
    return "inline" if method in ("deep-inline", "gradient-inline") else "deep"


def prompts_key(prompts: PromptSet) -> str:
    """What a prompt file is for: shallow, deep, inline (deep), sum (deep prefix), spot, ppt or head."""
    made: str | None = prompts.meta.provenance.get("method")
    if prompts.meta.is_single and made is not None:
        return made
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


def with_curve(result: dict[str, Any], stage1_ends: int | None = None) -> dict[str, Any]:
    """The result with its curve, and where stage I ended (None: where its prompt is from)."""
    found = read_curve(Path(result["run_dir"]))
    if stage1_ends is None:  # by gradient its prompt may be from any of its epochs
        stage1_ends = result["stages"].get("stage1", {}).get("iteration", 0)
    return result | {"curve": {"dev": found.dev, "loss": found.loss, "stage1_ends": stage1_ends}}


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
        if "sum" in self.prompts and "deep" not in self.prompts:  # the only deep ones: those of MP2
            self.prompts["deep"] = self.prompts.pop("sum")
        self.runtime = create_backend(
            "torch", self.backbone, device=settings.device, threads=1, precision=settings.precision
        )

    @property
    def _training(self) -> Any:
        """The precision of gradient tuning."""
        return self.settings.training_precision

    def lacking(self, methods: Sequence[str]) -> dict[str, list[str]]:
        """Kind of prompts that was not given -> those of ``methods`` that need it."""
        found: dict[str, list[str]] = {}
        for method in methods:
            need = [] if method in (*ALONE, "model-tuning") else [kind_of(method)]
            if method.endswith("-upstream-head"):
                need.append("head")
            for kind in need:
                if kind not in self.prompts:
                    found.setdefault(kind, []).append(method)
        return found

    def check(self, methods: Sequence[str]) -> None:
        """Raise ``UsageError`` if a method needs prompts that were not given."""
        for kind, (method, *_) in self.lacking(methods).items():
            raise UsageError(f"method '{method}' needs {kind} prompts: name a file of them in --prompts")

    def identity(self) -> dict[str, str]:
        """Hashes of the weights that scores depend on."""
        sets = {f"prompts_{kind}": found.sha256 for kind, (_, found) in self.prompts.items()}
        return {"backbone": self.backbone.sha256, **sets}

    def refusal(self, method: str, card: TaskCard) -> str | None:
        """Why the method cannot have this task, if it cannot."""
        if method in UNTUNED:
            return None
        if method in PUBLISHED:
            if card.type == "extraction":
                return "label words read classification and multiple choice; nor has the paper a number"
            if self.backbone.mlm_head is None:
                return f"the checkpoint of '{self.backbone.name}' has no masked-language-model head"
        try:
            MrcFormatter(card, self.backbone.tokenizer, self.settings.max_tokens)
        except UsageError as error:
            return (
                f"{error}; backbone '{self.backbone.name}' has {self.backbone.config.max_positions} positions"
            )
        return None

    def run(self, method: str, task: str, seed: int, shots: int | None = None) -> dict[str, Any]:
        """The cell's result: test scores by stage."""
        if method == "majority":
            return {"stages": {"final": {"test_score": self.majority(task)}}}
        base = BbtConfig(
            task=task,
            data=str(self.data),
            backbone=self.settings.backbone,
            iters=self.settings.iters,
            seed=seed,
            shots=shots,
            max_tokens=self.settings.max_tokens,
            test_limit=self.settings.test_limit,
            runtime="torch",
            device=self.settings.device,
            precision=self.settings.precision,
            threads=1,
            dev_every=self.settings.dev_every,
            baselines=False,
        )
        if method == "simple":
            return self._simple(base)
        own = method if shots is None else f"{method}-{shots}shots"
        folder = self.work / "runs" / Path(task).stem / f"{own}-seed{seed}"
        if method in PUBLISHED:
            config = replace(base, method=method)
            made = made_on_the_fly(self.backbone, str(config.prompts))
            return self._searched(config, folder, FrozenModel(self.backbone, made, self.runtime))
        if method in OF_TUNE:
            return self._tuned(method, base, folder)
        name, prompts = self._prompts(method, base)
        router = RouterConfig(method="none") if method.startswith("bbt") else RouterConfig()
        config = replace(base, prompts=name, router=router, head="span")
        model = FrozenModel(self.backbone, prompts, self.runtime)
        if not method.startswith("gradient"):
            return self._searched(config, folder, model)
        first = TuneConfig(run=config, epochs=self.settings.epochs, training_precision=self._training)
        scale = (
            PAPER_EPOCHS / first.n_epochs
        )  # fewer epochs, larger steps: Adam can go as far as in the paper
        if "scratch" in method:
            tuned = replace(first, router_epochs=0, prompt_lr=min(MOST, SCRATCH_LR * scale))
            return with_curve(start_tune(tuned, folder, model=model))
        router_lr, prompt_lr = (min(MOST, rate * scale) for rate in first.rates(model.kind))
        tuned = replace(first, router_lr=router_lr, prompt_lr=prompt_lr)
        return with_curve(start_tune(tuned, folder, model=model), tuned.n_epochs // 2)

    def _searched(self, config: BbtConfig, folder: Path, model: FrozenModel) -> dict[str, Any]:
        """A black-box run, begun, or gone on with where it was cut off."""
        for run in sorted(folder.glob("*/")):
            if (run / "journal.jsonl").is_file():
                return with_curve(resume_run(run))
        return with_curve(start_run(config, folder, model=model))

    def _tuned(self, method: str, base: BbtConfig, folder: Path) -> dict[str, Any]:
        """A run of ``mp2 tune --method``, of as many prompt tokens as MP2's prompts."""
        kind = kind_of(method)
        name, prompts = self.prompts.get(kind, (None, next(iter(self._any().values()))[1]))
        model = FrozenModel(self.backbone, prompts, self.runtime)
        started = method in ("spot", "ppt")
        tune = "prompt-tuning" if started else method
        of = TUNE[tune]
        epochs = min(self.settings.epochs, of.epochs) if of.trains_backbone else self.settings.epochs
        scale = 1.0 if of.trains_backbone else PAPER_EPOCHS / epochs  # as for MP2 by gradient
        config = TuneConfig(
            run=replace(base, prompts=name if started else None),
            method=tune,
            epochs=epochs,
            training_precision=self._training,
            lr=tuple(min(MOST, rate * scale) for rate in of.rates),
            prompt_tokens=prompts.meta.prompt_tokens if of.rows is not no_rows and not started else None,
        )
        return with_curve(start_tune(config, folder, model=model))

    def _any(self) -> dict[str, tuple[str, PromptSet]]:
        """The prompts that were given; untrained ones where there are none: only the backbone counts."""
        return self.prompts or {"": ("", untrained_prompts(self.backbone, "shallow"))}

    def _simple(self, base: BbtConfig) -> dict[str, Any]:
        """TF-IDF (extraction: the nearest clause) and the probe, where a task has them."""
        card = load_card(base.task)
        split = few_shot_split(card, load_examples(card, "train", self.data), base.seed, base.shots)
        tests = load_examples(card, "test", self.data, self.settings.test_limit)
        states = pooled_states(self.backbone, self.settings.max_tokens)
        lines = baselines(card, split.train, {"test": tests}, states)
        names = {"tfidf": "tfidf", "nearest": "tfidf", "probe": "probe"}
        stages = {
            names[line.key]: {"test_score": line.scores["test"]}
            for line in lines
            if line.key in names and line.note is None
        }
        return {"stages": stages}

    def _tuned_head(self, base: BbtConfig) -> PromptSet:
        """A random span head tuned on the few-shot examples, without prompts; tuned once."""
        folder = self.work / "runs" / Path(base.task).stem / f"head-{base.shots or ''}-seed{base.seed}"
        with FileLock(self.work / f"{Path(base.task).stem}-{base.shots or ''}-{base.seed}.lock"):
            for run in sorted(folder.glob("*/")):
                if (run / "result.json").is_file():
                    return load_prompts(run / "prompts.safetensors", self.backbone)
            config = TuneConfig(
                run=base,
                method="head-tuning",
                epochs=self.settings.epochs,
                training_precision=self._training,
            )
            model = FrozenModel(self.backbone, next(iter(self._any().values()))[1], self.runtime)
            result = start_tune(config, folder, model=model)
        return load_prompts(Path(result["run_dir"]) / "prompts.safetensors", self.backbone)

    def majority(self, task: str) -> float:
        """Score of the best constant answer on the test examples; extraction: of the whole context."""
        card = load_card(task)
        tests = load_examples(card, "test", self.data, self.settings.test_limit)
        if card.type == "extraction":
            return score(card, [e.fields["context"] for e in tests], tests)
        most = Counter(e.label for e in tests).most_common(1)[0][0]
        assert most is not None
        return score(card, [most] * len(tests), tests)

    def _prompts(self, method: str, base: BbtConfig) -> tuple[str, PromptSet]:
        """The method's prompts and the name of their file; derived ones are written to the work folder."""
        seed, key = base.seed, kind_of(method)
        if method in ("deep-sum", "gradient-sum") and "sum" in self.prompts:
            key = "sum"
        name, prompts = self.prompts[key]
        file = self.work / "prompts" / f"{method}-seed{seed}.safetensors"
        if method.startswith("bbt"):
            made = untrained_prompts(self.backbone, prompts, seed=seed)
            if method.endswith("-upstream-head"):
                made = with_head(made, self.prompts["head"][1])
            elif method.endswith("-tuned-head"):
                file = file.with_stem(f"{method}-{Path(base.task).stem}-{base.shots or ''}-seed{seed}")
                made = with_head(made, self._tuned_head(base))
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

"""What a cell of the transfer table runs: one method on one task with one seed.

========  ============================================================================================
deep      ``mp2 bbt``: router search, then CMA-ES layer by layer, from the pre-trained deep prompts
shallow   the same with shallow prompts
bbtv2     ``mp2 bbt --router-search none`` on ``mp2 scratch --like DEEP``: BBTv2, nothing pre-trained
bbt       the same with shallow prompts: BBT
gradient  ``mp2 tune``: both stages by Adam, deep; ``gradient-shallow`` with shallow prompts
majority  no model: the test set's most frequent label or option; in extraction the whole context
========  ============================================================================================

Ablations: ``*-sum`` divides a router by its sum instead of K, ``gradient-soft`` uses sigmoid weights instead
of w > 0 at inference (stage I is learned on soft samples either way). Prefix against inline: bbtv2 and deep
have prefixes, bbt and shallow inline rows at the input; the engine has no inline rows at deeper layers.

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

from filelock import FileLock

from mp2.backbone import load_backbone
from mp2.engine import create_runtime
from mp2.errors import UsageError
from mp2.optimizers import BbtConfig, RouterConfig, resume_run, start_run
from mp2.optimizers.few_shot_problem import FrozenModel
from mp2.prompts import PromptSet, load_prompts, save_prompts
from mp2.tasks import MrcFormatter, TaskCard, load_card, load_examples, score
from mp2.training.scratch import scratch_prompts
from mp2.training.tune import TuneConfig
from mp2.training.tune_run import start_tune

DEFAULT_METHODS = ("majority", "deep", "bbtv2", "shallow", "bbt", "gradient")
METHODS = (*DEFAULT_METHODS, "gradient-shallow", "deep-sum", "shallow-sum", "gradient-soft")
PAPER_EPOCHS = 1000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all cells of a table share."""

    backbone: str
    prompts: tuple[str, ...]  # one file a kind
    iters: int
    epochs: int
    test_limit: int
    max_tokens: int
    device: str = "cpu"
    precision: str = "fp32"


def kind_of(method: str) -> Literal["deep", "shallow"]:
    """Which prompts a method takes its own, or its shape and head, from."""
    return "shallow" if method == "bbt" or "shallow" in method else "deep"


class Lab:
    """Backbone, prompts and runtime, loaded once; runs cells."""

    def __init__(self, settings: Settings, data: Path, work: Path) -> None:
        self.settings, self.data, self.work = settings, data, work
        self.backbone = load_backbone(settings.backbone)
        self.prompts: dict[str, tuple[str, PromptSet]] = {}
        for name in settings.prompts:
            found = load_prompts(name, self.backbone)
            if found.kind in self.prompts:
                raise UsageError(f"--prompts: both {self.prompts[found.kind][0]} and {name} are {found.kind}")
            self.prompts[found.kind] = (name, found)
        self.runtime = create_runtime(
            "torch", self.backbone, device=settings.device, threads=1, precision=settings.precision
        )

    def check(self, methods: Sequence[str]) -> None:
        """Raise ``UsageError`` if a method needs prompts that were not given."""
        for method in methods:
            kind = kind_of(method)
            if method != "majority" and kind not in self.prompts:
                raise UsageError(f"method '{method}' needs {kind} prompts: name a {kind} file in --prompts")

    def identity(self) -> dict[str, str]:
        """Hashes of the weights that scores depend on."""
        sets = {f"prompts_{kind}": found.sha256 for kind, (_, found) in self.prompts.items()}
        return {"backbone": self.backbone.sha256, **sets}

    def refusal(self, card: TaskCard) -> str | None:
        """Why the task's options do not fit a sequence, if they do not."""
        try:
            MrcFormatter(card, self.backbone.tokenizer, self.settings.max_tokens)
        except UsageError as error:
            return str(error)
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
        name, prompts = self.prompts[kind_of(method)]
        file = self.work / "prompts" / f"{method}-seed{seed}.safetensors"
        if method.startswith("bbt"):
            made = scratch_prompts(self.backbone, prompts, seed=seed)
        elif method.endswith("-sum"):
            made = replace(prompts, meta=replace(prompts.meta, router_normalisation="sum"))
        elif method.endswith("-soft"):
            made = replace(prompts, meta=replace(prompts.meta, router_inference="soft"))
        else:
            return name, prompts
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                save_prompts(made, file)
        return str(file), made

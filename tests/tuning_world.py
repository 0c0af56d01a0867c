"""A whole little world on disk: a random backbone, its prompts, a task card, data. For tests of `mp2 bbt`."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import toy_examples

from mp2.backbone import Backbone, save_backbone
from mp2.prompts import random_prompts, save_prompts

CARD = """
task = "{task}"
family = "test"
type = "{type}"
template = "{template}"
metric = "{metric}"
track = "extra"
version = 1
{labels}
"""


@dataclass(frozen=True)
class World:
    """Paths of what was written."""

    root: Path
    backbone: Path
    deep: Path
    shallow: Path
    card: Path
    question_card: Path
    choice_card: Path
    data: Path

    def options(self, *, kind: str = "deep", card: Path | None = None) -> list[str]:
        """Options of ``mp2 bbt`` that name this world."""
        return [*self.tune_options(kind=kind, card=card), "--runtime", "torch", "--head", "span"]

    def tune_options(self, *, kind: str = "deep", card: Path | None = None) -> list[str]:
        """Those of ``mp2 tune``, which has no choice of runtimes."""
        prompts = self.deep if kind == "deep" else self.shallow
        return [
            *("--task", str(card or self.card), "--data", str(self.data), "--backbone", str(self.backbone)),
            *("--prompts", str(prompts), "--threads", "1", "--out", str(self.root / "runs")),
        ]


def make_world(root: Path, backbone: Backbone) -> World:
    """Write the world under ``root``."""
    folder = root / "tiny"
    save_backbone(backbone, folder)
    for kind in ("deep", "shallow"):
        prompts = random_prompts(
            backbone,
            "deep" if kind == "deep" else "shallow",
            n_modules=4,
            prompt_tokens=3,
            intrinsic_dim=5,
            scale=3.0,
            seed=1,
            tasks=("a", "b", "c"),
        )
        save_prompts(prompts, root / f"{kind}.safetensors")
    rng = random.Random(0)
    make = {
        "mood": lambda: toy_examples.mood(rng, 5, 12),
        "find": lambda: toy_examples.find(rng, 3),
        "pick": lambda: toy_examples.pick(rng, 5),
    }
    for task, example in make.items():
        (root / "data" / task).mkdir(parents=True)
        for split, n in (("train", 80), ("test", 12)):
            lines = [json.dumps(example(), ensure_ascii=False) for _ in range(n)]
            (root / "data" / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    cards = {
        "mood": {
            "type": "classification",
            "template": "“{text}”的情感是？选项：{options}",
            "metric": "accuracy",
        },
        "find": {"type": "extraction", "template": "{question}“{context}”", "metric": "f1"},
        "pick": {
            "type": "multiple_choice",
            "template": "“{context}”{question}选项：{options}",
            "metric": "accuracy",
        },
    }
    for task, values in cards.items():
        labels = '[labels]\npos = "正面"\nneg = "负面"' if task == "mood" else ""
        text = CARD.format(task=task, labels=labels, **values)
        (root / f"{task}.toml").write_text(text, "utf-8")
    return World(
        root=root,
        backbone=folder,
        deep=root / "deep.safetensors",
        shallow=root / "shallow.safetensors",
        card=root / "mood.toml",
        question_card=root / "find.toml",
        choice_card=root / "pick.toml",
        data=root / "data",
    )

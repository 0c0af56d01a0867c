"""Three toy tasks on disk, one of each type, in the characters of the tiny vocabulary."""

from __future__ import annotations

import json
import random
from pathlib import Path

import toy_examples
from tiny_words import tiny_vocab

from mp2.backbone import Backbone, BackboneConfig, random_backbone
from mp2.tasks import TaskCard, load_card

TEMPLATES = {
    "mood": ("classification", "“{text}”的情感是？选项：{options}", "accuracy"),
    "find": ("extraction", "{question}“{context}”", "f1"),
    "pick": ("multiple_choice", "“{context}”{question}选项：{options}", "accuracy"),
}


def write_tasks(root: Path, *, n_train: int = 60, n_dev: int = 12) -> tuple[list[TaskCard], Path]:
    """Write cards and data under ``root``; return the cards and the data folder."""
    rng = random.Random(0)
    make = {
        "mood": lambda: toy_examples.mood(rng, 4, 9),
        "find": lambda: toy_examples.find(rng, 2),
        "pick": lambda: toy_examples.pick(rng, 4),
    }
    for task, example in make.items():
        (root / "data" / task).mkdir(parents=True)
        for split, n in (("train", n_train), ("dev", n_dev)):
            lines = [json.dumps(example(), ensure_ascii=False) for _ in range(n)]
            (root / "data" / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        kind, template, metric = TEMPLATES[task]
        (root / f"{task}.toml").write_text(
            f'task = "{task}"\nfamily = "toy"\ntype = "{kind}"\n'
            f'template = "{template}"\nmetric = "{metric}"\n'
            'track = "extra"\nversion = 1\n'
            + ('[labels]\npos = "正面"\nneg = "负面"\n' if task == "mood" else ""),
            "utf-8",
        )
    return [load_card(str(root / f"{task}.toml")) for task in make], root / "data"


def lively_backbone(scale: float = 5.0) -> Backbone:
    """A random backbone whose layers mix their tokens strongly enough to be steered."""
    config = BackboneConfig(
        name="lively",
        n_layers=2,
        hidden=32,
        n_heads=4,
        ffn=48,
        vocab_size=len(tiny_vocab()),
        max_positions=96,
    )
    backbone = random_backbone(config, tiny_vocab(), seed=3)
    for name, parameter in backbone.encoder.named_parameters():
        if name.startswith("layers") and parameter.dim() == 2:
            parameter.mul_(scale)
    from mp2.backbone import freeze

    return freeze(config, backbone.encoder, backbone.tokenizer)

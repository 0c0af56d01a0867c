"""What recipes are given in tests: tasks with the names of the package's cards, and text."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mp2.tasks import load_card

ROOT = Path(__file__).resolve().parents[1]
CHARACTERS = "天地人你我他大小上下左右前后山水火木金土日月星风云雨雪花草树鱼鸟马牛羊米面饭菜茶房门窗床"
N_TRAIN, N_DEV = 24, 6


def write_upstream(folder: Path, tasks: Iterable[str], splits: Iterable[str] = ("train", "dev")) -> None:
    """Random texts for each task, with every label and option."""
    for task in tasks:
        rng = np.random.default_rng(len(task))
        (folder / task).mkdir(parents=True)
        for split in splits:
            n = N_TRAIN if split == "train" else N_DEV
            lines = [json.dumps(_example(task, rng, i), ensure_ascii=False) for i in range(n)]
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def _text(rng: np.random.Generator, n: int = 10) -> str:
    return "".join(rng.choice(list(CHARACTERS), n))


def _example(task: str, rng: np.random.Generator, i: int) -> dict[str, Any]:
    card = load_card(task)
    made: dict[str, Any] = {name: _text(rng) for name in card.fields}
    if card.type == "extraction":
        return made | {"answers": [{"text": made["context"][2:5], "start": 2}]}
    if card.type == "multiple_choice":
        return made | {"options": [_text(rng, 4) for _ in range(4)], "label": i % 4}
    return made | {"label": list(card.labels)[i % len(card.labels)]}


def write_corpus(folder: Path, n_documents: int, tasks: Iterable[str]) -> None:
    """Documents of four sentences in two files, with every character of the tasks' label words."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    words = "".join(word for task in tasks for word in load_card(task).labels.values())
    characters = sorted({*CHARACTERS, *words} - {" "})
    documents = []
    for _ in range(n_documents):
        sentences = ["".join(rng.choice(characters, 10)) + "。" for _ in range(4)]
        documents.append("".join(sentences[:2]) + "\n" + "".join(sentences[2:]))
    half = n_documents // 2
    for name, part in (("a", documents[:half]), ("b", documents[half:])):
        with lzma.open(folder / f"{name}.txt.xz", "wt", encoding="utf-8") as file:
            file.write("\n\n".join(part) + "\n")

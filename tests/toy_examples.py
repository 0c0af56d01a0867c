"""Examples of three toy tasks, one of each type, in the characters of the tiny vocabulary."""

from __future__ import annotations

import random
from typing import Any

GOOD, BAD = "真的很好不错喜欢", "太差了失望退货"
OPTIONS = ["天气", "旅游", "美食"]


def _text(rng: random.Random, characters: str, n: int) -> str:
    return "".join(rng.choice(characters) for _ in range(n))


def mood(rng: random.Random, shortest: int, longest: int) -> dict[str, Any]:
    """Good or bad words."""
    good = rng.random() < 0.5
    text = _text(rng, GOOD if good else BAD, rng.randint(shortest, longest))
    return {"text": text, "label": "pos" if good else "neg"}


def find(rng: random.Random, n_answer: int) -> dict[str, Any]:
    """Words of the weather between good and bad ones."""
    before, answer = _text(rng, GOOD, rng.randint(2, 8)), _text(rng, "天气今日晴", n_answer)
    context = before + answer + _text(rng, BAD, 3)
    return {"context": context, "question": "在哪里", "answers": [{"text": answer, "start": len(before)}]}


def pick(rng: random.Random, n_before: int) -> dict[str, Any]:
    """The option that ends the context."""
    right = rng.randrange(len(OPTIONS))
    context = _text(rng, GOOD, n_before) + OPTIONS[right]
    return {"context": context, "question": "是什么", "options": OPTIONS, "label": right}

"""Five small classification tasks as a user brings them: templated Chinese sentences, two to ten labels.

All sentences are made here from words and patterns written for this file; every label has its own words and
shares patterns with the others. `write_tasks` writes a card and ``train.jsonl``, ``test.jsonl`` for each.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

# task -> template; label -> the word shown to the model, patterns, and what fills {a} and {b} in them
_FILE = Path(__file__).with_suffix(".json")
TASKS: dict[str, tuple[str, dict[str, tuple[str, list[str], list[str], list[str]]]]] = {
    task: (
        found["template"],
        {label: (x["word"], x["patterns"], x["a"], x["b"]) for label, x in found["labels"].items()},
    )
    for task, found in json.loads(_FILE.read_text("utf-8")).items()
}


def sentences(task: str, label: str) -> list[str]:
    """Return every sentence of a label, in a fixed order."""
    _, patterns, a, b = TASKS[task][1][label]
    made = [p.format(a=x, b=y) for p, x, y in itertools.product(patterns, a, b)]
    return list(dict.fromkeys(made))


def write_tasks(folder: Path, *, seed: int, n_train: int = 32, n_test_per_label: int = 20) -> list[Path]:
    """Write all tasks; returns the cards. ``n_train`` examples in all, balanced as far as that goes."""
    cards = []
    for task, (template, labels) in TASKS.items():
        rng = random.Random(f"{task} {seed}")
        train, test = [], []
        for i, label in enumerate(labels):
            rows = [{"text": text, "label": label} for text in sentences(task, label)]
            rng.shuffle(rows)
            own = n_train // len(labels) + (i < n_train % len(labels))
            train += rows[:own]
            test += rows[own : own + n_test_per_label]
        rng.shuffle(train)
        where = folder / task
        where.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", train), ("test", test)):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (where / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        words = "".join(f'{label} = "{word}"\n' for label, (word, *_) in labels.items())
        cards.append(folder / f"{task}.toml")
        cards[-1].write_text(
            f'task = "{task}"\nfamily = "own"\ntype = "classification"\ntemplate = "{template}"\n'
            f'metric = "accuracy"\ntrack = "extra"\nversion = 1\n[labels]\n{words}',
            encoding="utf-8",
        )
    return cards

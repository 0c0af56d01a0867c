"""Every card against its real data set, where that is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mp2.backbone.tokenizer import Tokenizer
from mp2.errors import UsageError
from mp2.tasks import (
    Example,
    MrcFormatter,
    TaskCard,
    card_names,
    few_shot_split,
    list_cards,
    load_card,
    load_examples,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LATIN = "abcdefghijklmnopqrstuvwxyz0123456789"
LENGTH = 512
N = 50


def folders(data_dir: Path, card: TaskCard) -> list[Path]:
    return [data_dir / name for name in ("upstream", "downstream") if (data_dir / name / card.task).is_dir()]


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> Tokenizer:
    """A character vocabulary of the first examples of every task."""
    chars: set[str] = set()
    for card in list_cards():
        chars.update(card.template, *card.labels.values())
        for folder in folders(data_dir, card):
            for example in load_examples(card, "train", folder, limit=N):
                chars.update(*example.fields.values(), *example.options)
    chars = {c.lower() for c in chars if len(c.lower()) == 1 and not c.isspace()} - set(LATIN)
    return Tokenizer.from_vocab([*SPECIAL, *sorted(chars), *LATIN, *(f"##{c}" for c in LATIN)])


@pytest.mark.parametrize("task", card_names())
def test_every_card_formats_examples_of_its_data(data_dir: Path, tokenizer: Tokenizer, task: str) -> None:
    card = load_card(task)
    if not folders(data_dir, card):
        pytest.skip("this data set is not at hand")
    vocab = tokenizer.tokens()
    formatter = MrcFormatter(card, tokenizer, LENGTH)
    for folder in folders(data_dir, card):
        examples = load_examples(card, "train", folder, limit=N)
        n_answered = 0
        for index, example in enumerate(examples):
            if not formatter.fits(example):
                assert card.type == "multiple_choice"
                continue
            item = formatter.training_input(example, index)
            assert item.n_tokens <= LENGTH
            assert vocab[item.input_ids[0]] == "[CLS]"
            assert vocab[item.input_ids[-1]] == "[SEP]"
            gold = "".join(vocab[i] for i in item.input_ids[item.start : item.end + 1])
            n_answered += same(gold, example, card)
        assert n_answered >= 0.95 * len(examples), (task, n_answered)


def same(gold: str, example: Example, card: TaskCard) -> bool:
    """Tell whether the gold tokens spell the answer (widened to word edges in extraction)."""
    if card.type == "classification":
        return gold == card.labels[str(example.label)]
    if card.type == "multiple_choice":
        answer = example.options[int(example.label or 0)]
    elif example.answers:
        answer = example.answers[0].text
    else:
        return gold == "[CLS]"
    plain = "".join(answer.lower().split())
    return "[UNK]" in gold or plain in gold.replace("##", "") or len(plain) > 200


def test_the_manifests_labels_are_the_cards(data_dir: Path) -> None:
    for line in (data_dir / "manifest.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        card = load_card(entry["task"])
        assert card.type == entry["type"]
        assert set(entry["labels"] or ()) <= set(card.labels), entry["task"]


def test_few_shot_splits_can_be_drawn_from_every_downstream_task(data_dir: Path) -> None:
    for folder in sorted((data_dir / "downstream").iterdir()):
        card = load_card(folder.name)
        if card.task == "iflytek":  # some of its 119 labels have a single example in this subset
            with pytest.raises(
                UsageError, match=r"too few different training examples: 1 with label .* at least 2"
            ):
                few_shot_split(card, load_examples(card, "train", folder.parent), seed=8)
            continue
        split = few_shot_split(card, load_examples(card, "train", folder.parent), seed=8)
        assert len(split.train) == len(split.dev) == (8 * len(card.labels) if len(card.labels) > 5 else 32)

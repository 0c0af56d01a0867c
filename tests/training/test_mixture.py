"""Sampling of the multi-task mixture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mp2.backbone import Backbone, Tokenizer
from mp2.errors import UsageError
from mp2.tasks import MrcInput, TaskCard, load_card, load_examples
from mp2.training.mixture import Batch, MixtureTask, load_mixture, pad, sample_batch
from training.toy_tasks import write_tasks

CHI_SQUARE_999 = {2: 13.82, 9: 27.88, 36: 67.98}
"""Values exceeded by chance once in a thousand, by degrees of freedom."""


def numbered(n: int) -> list[MrcInput]:
    """Inputs of different lengths; the second token is the input's number."""
    return [
        MrcInput(
            example=i,
            input_ids=np.array([2, 100 + i, *[7] * (i * 7 % 11), 3]),
            start=1,
            end=1 + i % 2,
            option_spans=np.empty((0, 2), np.int64),
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> list[TaskCard]:
    return write_tasks(tmp_path_factory.mktemp("cards"))[0]


def mixture(cards: list[TaskCard], *sizes: int) -> list[MixtureTask]:
    return [MixtureTask(card, numbered(n), [], []) for card, n in zip(cards, sizes, strict=False)]


def draw(tasks: list[MixtureTask], step: int, *, batch_size: int = 4, seed: int = 0) -> Batch:
    return sample_batch(tasks, step, batch_size=batch_size, seed=seed, pad_id=0)


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_tasks_are_drawn_uniformly_whatever_their_sizes(cards: list[TaskCard]) -> None:
    tasks = mixture(cards, 3, 40, 400)
    counts = np.bincount([draw(tasks, step, batch_size=2).task for step in range(3000)], minlength=3)
    assert chi_square(counts) < CHI_SQUARE_999[2]


@pytest.mark.parametrize("n", [10, 37], ids=["two-batches", "many-batches"])
def test_every_example_has_the_same_chance_whatever_its_length(cards: list[TaskCard], n: int) -> None:
    tasks = mixture(cards, n)
    counts = np.zeros(n, int)
    for step in range(3000):
        numbers = draw(tasks, step).input_ids[:, 1].numpy() - 100
        assert len(set(numbers.tolist())) == 4  # without replacement
        counts[numbers] += 1
    assert chi_square(counts) < CHI_SQUARE_999[n - 1]


def test_a_batch_depends_on_seed_and_step_alone(cards: list[TaskCard]) -> None:
    tasks = mixture(cards, 30, 30, 30)
    forward = [draw(tasks, step) for step in range(20)]
    np.random.default_rng(0)
    torch.rand(3)
    for step in reversed(range(20)):
        again = draw(tasks, step)
        assert again.task == forward[step].task
        assert torch.equal(again.input_ids, forward[step].input_ids)
        assert torch.equal(again.end, forward[step].end)
    others = [draw(tasks, step, seed=1) for step in range(20)]
    assert any(
        a.task != b.task or not torch.equal(a.input_ids, b.input_ids)
        for a, b in zip(others, forward, strict=True)
    )
    assert len({(b.task, tuple(b.input_ids[:, 1].tolist())) for b in forward}) == 20


def test_ids_masks_and_gold_spans_belong_together(cards: list[TaskCard]) -> None:
    tasks = mixture(cards, 30)
    for step in range(30):
        batch = draw(tasks, step, batch_size=5)
        for row, number in enumerate((batch.input_ids[:, 1] - 100).tolist()):
            item = tasks[0].train[number]
            n = item.n_tokens
            assert batch.mask[row].tolist() == [True] * n + [False] * (batch.mask.shape[1] - n)
            assert batch.input_ids[row, :n].tolist() == item.input_ids.tolist()
            assert not batch.input_ids[row, n:].any()
            assert (batch.start[row], batch.end[row]) == (item.start, item.end)


def test_a_task_smaller_than_the_batch_gives_all_it_has(cards: list[TaskCard]) -> None:
    assert sorted(draw(mixture(cards, 3), 0, batch_size=32).input_ids[:, 1].tolist()) == [100, 101, 102]


def test_batches_of_similar_length_need_little_padding(cards: list[TaskCard]) -> None:
    tasks = mixture(cards, 400)
    batches = [draw(tasks, step, batch_size=16) for step in range(200)]
    padding = 1 - np.mean([b.mask.double().mean().item() for b in batches])
    rng = np.random.default_rng(0)
    plain = []
    for _ in range(200):
        _, mask = pad([tasks[0].train[i] for i in rng.choice(400, 16, replace=False)], 0)
        plain.append(1 - mask.mean())
    assert padding < np.mean(plain) / 2


def test_tasks_that_do_not_fit_are_left_out_with_a_line_that_says_why(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    cards, data = write_tasks(tmp_path)
    (tmp_path / "wide.toml").write_text(
        (tmp_path / "mood.toml").read_text().replace('"负面"', '"' + "负面" * 20 + '"'), "utf-8"
    )
    from mp2.tasks import load_card

    lines: list[str] = []
    wide = load_card(str(tmp_path / "wide.toml"))
    tasks = load_mixture([wide, *cards], data, tiny_backbone.tokenizer, 40, dev_limit=5, log=lines.append)
    assert [task.card.task for task in tasks] == ["mood", "find", "pick"]
    assert [len(task.dev_examples) for task in tasks] == [5, 5, 5]
    assert [len(task.train) for task in tasks] == [60, 60, 60]
    assert len(lines) == 1
    assert "left out: task 'mood' does not fit 40 tokens" in lines[0]
    with pytest.raises(UsageError, match="none of the 1 tasks can be trained on within 40 tokens"):
        load_mixture([wide], data, tiny_backbone.tokenizer, 40, dev_limit=5, log=lines.append)


@pytest.mark.parametrize(("name", "shuffled"), [("demo_sentiment", False), ("demo_topic", True)])
def test_a_rotated_task_has_the_same_text_and_options_and_the_next_option_as_answer(
    name: str, shuffled: bool
) -> None:
    card = load_card(name)
    tokenizer = Tokenizer.from_vocab(demo_vocab(card))
    logged: list[str] = []
    plain, rotated = load_mixture(
        [card], None, tokenizer, 120, dev_limit=8, rotated=True, shuffle_options=shuffled, log=logged.append
    )
    assert rotated.card.task == f"{name}_rotated"
    assert not logged
    pairs = [*zip(plain.train, rotated.train, strict=True), *zip(plain.dev, rotated.dev, strict=True)]
    for one, other in pairs:
        assert (one.input_ids == other.input_ids).all()
        spans = [tuple(span) for span in one.option_spans]
        right = spans.index((one.start, one.end))
        assert spans[(right + 1) % len(spans)] == (other.start, other.end)
    for example, item in zip(rotated.dev_examples, rotated.dev, strict=True):
        words = [tuple(span) for span in item.option_spans]
        assert list(rotated.card.labels)[words.index((item.start, item.end))] == example.label


def test_shuffled_options_keep_the_right_word() -> None:
    card = load_card("demo_topic")
    tokenizer = Tokenizer.from_vocab(demo_vocab(card))
    (plain,) = load_mixture([card], None, tokenizer, 120, dev_limit=8, log=print)
    (shuffled,) = load_mixture(
        [card], None, tokenizer, 120, dev_limit=8, shuffle_options=True, seed=3, log=print
    )
    same_order = 0
    for one, other in zip(plain.train, shuffled.train, strict=True):
        assert sorted(one.input_ids) == sorted(other.input_ids)
        words = [x.input_ids[x.start : x.end + 1].tolist() for x in (one, other)]
        assert words[0] == words[1]
        same_order += bool((one.input_ids == other.input_ids).all())
    assert same_order < 3
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(plain.dev, shuffled.dev, strict=True))


def demo_vocab(card: TaskCard) -> list[str]:
    texts = [
        card.template,
        *card.labels.values(),
        "，。",
        *(e.fields["text"] for e in load_examples(card, "train")),
    ]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set("".join(texts).lower()) - {" "})]

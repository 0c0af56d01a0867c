"""Tasks cut out of plain text: what each asks, the shared inputs, the files written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mp2.cli import main
from mp2.errors import UsageError
from mp2.tasks import load_card, load_examples
from mp2.training.corpus_words import Words, documents, find_words, longest_common
from mp2.training.pseudo_examples import POLAR_WORDS, Maker
from mp2.training.pseudo_tasks import PSEUDO_TASKS, make_pseudo_tasks

NAMES = [chr(0x5000 + 2 * i) + chr(0x5001 + 2 * i) for i in range(700)]  # a character is in one word only
MARKS = 0xAC00


def corpus(folder: Path, n_documents: int = 6000) -> Path:
    """Documents of four sentences about three things, with an opinion; each thing in some 30 documents.

    Every sentence begins with a character that stands in no other document.
    """
    rng = np.random.default_rng(0)
    folder.mkdir()
    lines = []
    for i in range(n_documents):
        mark = chr(MARKS + i)
        a, b, c = (NAMES[i] for i in rng.integers(len(NAMES), size=3))
        sense = POLAR_WORDS[rng.integers(len(POLAR_WORDS) - 1)][rng.integers(2)]
        lines.append(f"{mark}我在河边看到了{a}和一种{b}。{mark}今天的{b}离这里不远，{a}也在。")
        lines.append(f"{mark}听说{b}让人觉得{sense}，这里的{c}也这样。{mark}后来又有了{a}和{c}。")
        lines.append("")
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pseudo")
    out = folder / "tasks"
    make_pseudo_tasks(
        corpus(folder / "corpus"), out, examples=200, dev=40, seed=3, files=None, log=lambda _: None
    )
    return out


def records(made: Path, task: str, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made / task / f"{split}.jsonl").read_text("utf-8").splitlines()]


def answer(record: dict[str, Any]) -> str:
    return str(record["options"][record["label"]])


def test_words_are_pairs_that_stick_together(tmp_path: Path) -> None:
    texts = list(documents([corpus(tmp_path / "c") / "text.txt"]))
    assert len(texts) == 6000
    assert all(len(sentences) == 4 for sentences in texts)
    words = find_words(texts)
    assert len(set(words.documents) & set(NAMES)) > 600
    assert "今天" not in words.documents  # in every document
    assert not any(pair[0] == name[1] for name in NAMES[:50] for pair in words.documents)  # no half words
    rare, common = (sorted(words.documents, key=lambda w: words.documents[w])[i] for i in (0, -1))
    assert words.salient(f"今天{common}和{rare}")[0] == rare
    assert words.salient(f"{common}今天{rare}和{common}")[0] == common  # twice in the text


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"0 words found in 2 documents, expected at least 50"):
        find_words([["你好。"], ["再见。"]])


def test_cards_and_examples_load(made: Path) -> None:
    for task in PSEUDO_TASKS:
        card = load_card(made / f"{task}.toml")
        assert card.task == task
        assert len(load_examples(card, "train", made)) == 200
        assert len(load_examples(card, "dev", made)) == 40
        assert not {json.dumps(r) for r in records(made, task)} & {
            json.dumps(r) for r in records(made, task, "dev")
        }


def test_no_document_is_in_both_splits_and_no_input_comes_twice(made: Path) -> None:
    both = {
        split: [(t, r) for t in PSEUDO_TASKS for r in records(made, t, split)] for split in ("train", "dev")
    }
    marks = {
        split: {
            c
            for _, record in found
            for c in json.dumps(record, ensure_ascii=False)
            if 0 <= ord(c) - MARKS < 6000
        }
        for split, found in both.items()
    }
    assert min(map(len, marks.values())) > 30
    assert not marks["train"] & marks["dev"]
    inputs = [
        (task, record["context"], record["question"], *record.get("options", ()))
        for found in both.values()
        for task, record in found
    ]
    assert len(set(inputs)) == len(inputs)


def test_equal_documents_do_not_bring_a_dev_input_into_training(tmp_path: Path) -> None:
    source = corpus(tmp_path / "corpus")
    text = (source / "text.txt").read_text("utf-8")
    (source / "again.txt").write_text(text + "\n", "utf-8")
    make_pseudo_tasks(source, tmp_path / "out", examples=600, dev=300, seed=1, files=None, log=lambda _: None)
    for task in PSEUDO_TASKS:
        found = [
            (r["context"], r["question"], str(r.get("options"))) for r in records(tmp_path / "out", task)
        ]
        dev = [
            (r["context"], r["question"], str(r.get("options")))
            for r in records(tmp_path / "out", task, "dev")
        ]
        assert len({*found, *dev}) == 900


def test_what_a_task_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mp2.training.pseudo_tasks._PASSES", 1)
    lines: list[str] = []
    source = corpus(tmp_path / "corpus")
    made = make_pseudo_tasks(
        source, tmp_path / "out", examples=2000, dev=20, seed=0, files=None, log=lines.append
    )
    assert made["edited"] == 2000
    assert made["follows_not"] < 2000
    assert f"follows_not: {made['follows_not']:,} of 2,000 training, 20 of 20 dev examples" in lines
    assert not any(line.startswith("edited") for line in lines)
    assert len(records(tmp_path / "out", "follows_not")) == made["follows_not"]


def test_word_tasks_share_inputs_and_differ_in_the_answer(made: Path) -> None:
    four = [records(made, f"word_{what}") for what in ("missing", "present", "next", "common")]
    for missing, present, following, common in zip(*four, strict=True):
        assert missing["context"] == present["context"] == following["context"] == common["context"]
        assert missing["options"] == present["options"] == following["options"] == common["options"]
        assert answer(missing) not in missing["context"]
        assert answer(present) in present["context"]
        assert following["label"] == (missing["label"] + 1) % len(missing["options"])
    assert len({r["label"] for r in four[0]}) > 2  # the place of the answer tells nothing
    assert [r["label"] for r in four[3]] != [r["label"] for r in four[0]]


def test_polar_tasks_are_opposite_and_balanced(made: Path) -> None:
    sense = {word: side for pair in POLAR_WORDS for side, word in enumerate(pair)}
    polar, opposite = records(made, "polar"), records(made, "polar_opposite")
    for one, other in zip(polar, opposite, strict=True):
        assert one["options"] == other["options"]
        assert one["label"] == 1 - other["label"]
        assert not any(word in one["context"] for word in sense if len(word) > 1)
    good = sum(sense[answer(record)] == 0 for record in polar)
    assert 80 <= good <= 120
    assert 60 <= sum(record["label"] for record in polar) <= 140


def test_pairs_answer_in_either_order(made: Path) -> None:
    for task in ("same", "edited"):
        found = records(made, task)
        assert 60 <= sum(record["label"] for record in found) <= 140
        assert all(record["question"] for record in found)
    for one, other in zip(records(made, "same"), records(made, "same_opposite"), strict=True):
        assert one["options"] == other["options"]
        assert one["label"] == 1 - other["label"]


def test_recurring_answers_fill_the_gap(made: Path) -> None:
    for record in records(made, "recurring"):
        (found,) = record["answers"]
        start = found["start"]
        assert record["context"][start : start + len(found["text"])] == found["text"]
        assert found["text"] not in record["question"]
        assert "什么" in record["question"]


def test_the_same_seed_makes_the_same_folder(made: Path, tmp_path: Path) -> None:
    source = corpus(tmp_path / "corpus")
    for name, seed in (("again", 3), ("other", 4)):
        make_pseudo_tasks(
            source, tmp_path / name, examples=200, dev=40, seed=seed, files=None, log=lambda _: None
        )
    for task in PSEUDO_TASKS:
        assert records(made, task) == records(tmp_path / "again", task)
    assert records(made, "polar") != records(tmp_path / "other", "polar")


def test_a_folder_is_never_overwritten_nor_left_half_written(made: Path, tmp_path: Path) -> None:
    source = corpus(tmp_path / "corpus", 60)
    with pytest.raises(UsageError, match=r"exists; give a new folder"):
        make_pseudo_tasks(source, made, examples=5, dev=5, seed=0, files=None, log=lambda _: None)
    with pytest.raises(UsageError, match=r"words found in 60 documents"):
        make_pseudo_tasks(source, tmp_path / "new", examples=5, dev=5, seed=0, files=None, log=lambda _: None)
    assert not (tmp_path / "new").exists()


def test_a_new_pass_cuts_other_pieces() -> None:
    text = [f"第{i}句话说的是{name}很多很多。" for i, name in enumerate(NAMES[:40])]
    maker = Maker([text], Words(dict.fromkeys(NAMES, 30), 10_000), np.random.default_rng(0))
    found = [json.dumps(record) for _ in range(8) for task, record in maker.pair(text) if task == "same"]
    assert len(found) == 8
    assert len(set(found)) > 4


def test_longest_common_run() -> None:
    assert longest_common("今天去北京大学", "北京大学很大", 8) == "北京大学"
    assert longest_common("今天去北京大学", "北京大学很大", 3) == "北京大"
    assert longest_common("甲", "乙", 8) == ""


def test_the_command_says_what_it_made_and_refuses_bad_numbers(tmp_path: Path) -> None:
    source = corpus(tmp_path / "corpus")
    arguments = ["pseudo-tasks", "--corpus", str(source), "--out", str(tmp_path / "out"), "--examples", "20"]
    bad = CliRunner().invoke(main, [*arguments, "--dev", "0"])
    assert bad.exit_code == 2
    assert "--dev 0: expected at least 1" in bad.output
    done = CliRunner().invoke(main, [*arguments, "--dev", "5"])
    assert done.exit_code == 0
    assert "12 tasks, 240 training examples" in done.output

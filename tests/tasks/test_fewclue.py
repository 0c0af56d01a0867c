"""FewCLUE's nine data sets as they are published: file names and records alike, with texts of our own.

The layouts are those of github.com/CLUEbenchmark/FewCLUE, datasets/: five splits ``train_0.json`` ...
``dev_4.json`` of JSON lines, all of them in ``train_few_all.json``, a labelled ``test_public.json``, a
``test.json`` and an ``unlabeled.json`` without labels. Labels are whole numbers in some, strings in others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mp2.tasks import load_card, load_examples
from tests.command_line import mp2, mp2_json

SIGNS = "今天气很好我们去看电影吃饭一二三四五六七八九十的是在和了不人有大小上下学校老师飞机工程"
GOLD = ("label", "label_desc", "label_des", "answer", *(f"label{i}" for i in range(5)))
TNEWS = load_card("tnews").source.labels  # type: ignore[union-attr]
APPS = list(load_card("iflytek").labels)
SUBJECTS = ["交通运输工程", "基础医学/临床医学", *(a + b + "学科" for a in SIGNS[:13] for b in SIGNS[13:18])]

Made = tuple[int, Callable[[int, Callable[[int], str]], dict[str, Any]]]
SETS: dict[str, Made] = {  # examples of a split, one of them
    "eprstmt": (
        32,
        lambda i, s: {
            "id": i,
            "sentence": s(9) + "差好"[i % 2],
            "label": ("Negative", "Positive")[i % 2],
        },
    ),
    "tnews": (
        120,
        lambda i, s: {
            "label": int(list(TNEWS)[i % 15]),
            "label_desc": list(TNEWS.values())[i % 15],
            "sentence": s(12),
            "keywords": f"{s(2)},{s(3)}" if i % 4 else "",
            "id": 9 * i,
        },
    ),
    "csldcp": (536, lambda i, s: {"content": s(60), "label": SUBJECTS[i % 67], "id": i}),
    "iflytek": (
        928,
        lambda i, s: {"label": i % 119, "label_des": APPS[i % 119], "sentence": s(20), "id": i},
    ),
    "ocnli": (
        32,
        lambda i, s: {
            "level": ("easy", "medium", "hard")[i % 3],
            "sentence1": s(12),
            "sentence2": s(8),
            "label": ("entailment", "neutral", "contradiction")[i // 2 % 3],
            **dict.fromkeys((f"label{j}" for j in range(5)), None),
            "genre": ("lit", "gov", "phone")[i // 3 % 3],
            "prem_id": f"lit_{i}",
            "id": i,
        },
    ),
    "bustm": (32, lambda i, s: {"id": i, "sentence1": s(6), "sentence2": s(7), "label": str(i % 2)}),
    "chid": (
        42,
        lambda i, s: {
            "id": i,
            "candidates": [s(3) + SIGNS[j] for j in range(7)],
            "content": f"{s(30)}#idiom#{s(30)}...",
            "answer": i % 7,
        },
    ),
    "csl": (32, lambda i, s: {"id": i, "abst": s(50), "keyword": [s(2), s(3)], "label": str(i % 2)}),
    "cluewsc": (
        32,
        lambda i, s: {
            "target": {
                "span2_index": 12,
                "span1_index": 0,
                "span1_text": s(2),
                "span2_text": "他",
            },
            "idx": i,
            "label": ("false", "true")[i % 2],
            "text": s(25),
        },
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("FewCLUE") / "datasets"
    rng = random.Random(0)

    def some(n: int) -> str:
        return "".join(rng.choices(SIGNS, k=n))

    def write(path: Path, records: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        path.write_text(lines, encoding="utf-8")

    for task, (n, made) in SETS.items():
        of = folder / task
        for split in ("train", "dev"):
            folds = [[made(i, some) for i in range(n)] for _ in range(2 if n > 100 else 5)]
            for k, records in enumerate(folds):
                write(of / f"{split}_{k}.json", records)
            write(of / f"{split}_few_all.json", [record for fold in folds for record in fold])
        tests = [made(i, some) for i in range(n if n > 100 else 40)]
        write(of / "test_public.json", tests)
        bare = [{key: value for key, value in record.items() if key not in GOLD} for record in tests]
        write(of / "test.json", bare)
        write(of / "unlabeled.json", bare)
    return folder


def counts(task: str) -> str:
    n = SETS[task][0]
    return f"{n} train, {n} dev, {n if n > 100 else 40} test"


@pytest.mark.parametrize("task", ["tnews", "iflytek", "ocnli", "csl", "cluewsc"])
def test_the_cards_of_the_package_read_them(root: Path, task: str) -> None:
    done = mp2("tasks", "check", task, "--data", root / task)
    assert (done.exit_code, f"{task}: classification, {counts(task)}" in done.output) == (0, True), (
        done.output
    )
    others = root / task / "train_1.json"
    assert mp2("tasks", "check", task, "--data", others).exit_code == 0
    first = load_examples(load_card(task), "dev", others)[0].fields
    assert first != load_examples(load_card(task), "dev", root / task)[0].fields
    everything = root / task / "train_few_all.json"
    assert len(load_examples(load_card(task), "train", everything)) == SETS[task][0] * (
        5 if SETS[task][0] == 32 else 2
    )
    assert len(load_examples(load_card(task), "dev", everything)) > SETS[task][0]
    assert load_examples(load_card(task), "test", everything)


@pytest.mark.parametrize(
    ("task", "fields", "left_out"),
    [
        ("eprstmt", {"text": "sentence"}, []),
        ("tnews", {"text": "sentence"}, ["'keywords' (empty in 30 of 120)"]),
        ("csldcp", {"text": "content"}, []),
        ("iflytek", {"text": "sentence"}, []),
        (
            "ocnli",
            {"text1": "sentence1", "text2": "sentence2"},
            ["'level' (3 values)", "'genre' (3 values)", "'prem_id' (a number or name of the example)"],
        ),
        ("bustm", {"text1": "sentence1", "text2": "sentence2"}, []),
        ("chid", {"options": "candidates", "label": "answer", "context": "content"}, []),
        ("csl", {"text1": "abst", "text2": "keyword"}, []),
        (
            "cluewsc",
            {"text1": "target.span1_text", "text2": "text"},
            ["'target.span2_text' (1 values)"],
        ),
    ],
)
def test_a_card_that_new_proposes_is_one_that_a_run_takes(
    root: Path, tmp_path: Path, task: str, fields: dict[str, str], left_out: list[str]
) -> None:
    card = tmp_path / f"{task}.toml"
    done = mp2("tasks", "new", root / task, "--out", card)
    assert done.exit_code == 0, done.output
    source = load_card(card).source
    assert source is not None
    assert source.fields == fields
    assert [name for name in left_out if name not in done.output] == []
    assert bool(left_out) == ("left out:" in done.output)
    done = mp2("tasks", "check", card, "--data", root / task)
    assert (done.exit_code, counts(task) in done.output) == (0, True), done.output


@pytest.mark.parametrize("task", ["csldcp", "chid", "cluewsc"])
def test_a_run_takes_what_check_takes(root: Path, tmp_path: Path, task: str) -> None:
    card = tmp_path / f"{task}.toml"
    assert mp2("tasks", "new", root / task, "--out", card).exit_code == 0
    words = ("--task", card, "--data", root / task, "--shots", 32 if task == "chid" else 2)
    if task == "csldcp":  # 67 options take more
        words += ("--max-tokens", 256)
    budget = ("--iters", 4, "--router-iters", 2, "--threads", 1, "--test-limit", 20, "--no-baselines")
    result = mp2_json("bbt", *words, *budget, "--out", tmp_path / "runs")
    assert result["test_score"] is not None
    if task == "csldcp":
        assert result["head"]["kind"] == "ridge"
        assert "the span head cannot read this task: task 'csldcp' does not fit" in result["head"]["reason"]

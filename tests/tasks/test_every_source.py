"""Each card's own source, loaded from a local server that has made-up files in that source's format."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from test_fetch import Web, tarred, web, zipped  # noqa: F401 - a fixture

from mp2.tasks import TaskCard, list_cards, load_examples
from mp2.tasks.fetch import fetch_task

N = 40  # examples a file
CARDS = [card for card in list_cards() if card.source is not None and card.source.files]


def raw_labels(card: TaskCard) -> list[str]:
    assert card.source is not None
    return [
        {ours: raw for raw, ours in card.source.labels.items()}.get(label, label) for label in card.labels
    ]


def record(card: TaskCard, i: int) -> dict[str, Any]:
    """The i-th made-up example under the source's own names."""
    assert card.source is not None
    values: dict[str, Any] = {key: f"{key}第{i}条" for key in card.fields}
    if card.type == "classification":
        labels = raw_labels(card)
        values["label"] = labels[i % len(labels)]
    elif card.type == "multiple_choice":
        values |= {"options": [f"选{i}", f"项{i}", f"丙{i}", f"丁{i}"], "label": i % 4}
    else:
        values["answers"] = f"第{i}条"
    return {card.source.fields.get(key, key): value for key, value in values.items()}


def content(card: TaskCard, name: str, first: int) -> str:
    """A file of N examples, from ``first`` on, in the form of the card's source."""
    assert card.source is not None
    records = [record(card, first + i) for i in range(N)]
    if card.source.format == "lines":
        columns = card.source.columns.split(",")
        rows = [[str(r.get(column, first + i)) for column in columns] for i, r in enumerate(records)]
        return "".join(card.source.separator.join(row) + "\n" for row in rows)
    if card.source.format == "squad":
        paragraphs = [
            {
                "context": r["context"],
                "qas": [
                    {
                        "question": r["question"],
                        "id": str(i),
                        "answers": [{"text": r["answers"], "answer_start": r["context"].index(r["answers"])}],
                    }
                ],
            }
            for i, r in enumerate(records)
        ]
        return json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]})
    if card.source.format == "c3":
        nested = []
        for i, r in enumerate(records):
            question = {"question": r["question"], "choice": r["choice"], "answer": r["choice"][i % 4]}
            nested.append([[r["context"]], [question], f"m-{i}"])
        return json.dumps(nested, ensure_ascii=False)
    if name.endswith((".csv", ".tsv")):
        mark = "," if name.endswith(".csv") else "\t"
        head = list(records[0])
        return "".join(mark.join(map(str, row)) + "\n" for row in [head, *(r.values() for r in records)])
    if name.endswith(".jsonl"):
        return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    return json.dumps(records, ensure_ascii=False)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.task)
def test_a_cards_source_is_read_as_it_is_published(
    web: Web,  # noqa: F811 - the fixture
    card: TaskCard,
    tmp_path: Path,
) -> None:
    assert card.source is not None
    archives: dict[str, dict[str, str]] = {}
    files, first = {}, 0
    for split, addresses in card.source.files.items():
        local = []
        for address in addresses.split():
            path, _, inside = address.partition("#")
            name = urlsplit(path).path.strip("/")
            local.append(f"{web.address}/{name}" + (f"#{inside}" if inside else ""))
            text = content(card, inside or name, first)
            first += N
            if inside:
                archives.setdefault(name, {})[inside] = text
            else:
                web.put(name, text)
        files[split] = " ".join(local)
    for name, members in archives.items():
        if name.endswith(".zip"):
            web.put(name, zipped(**{member.replace("/", "__"): text for member, text in members.items()}))
        else:
            web.put(name, tarred(members))
    counts = {split: N * len(addresses.split()) for split, addresses in files.items()}
    here = replace(card, source=replace(card.source, files=files, digests={}, counts=counts))
    fetched = fetch_task(here, tmp_path)
    assert sum(fetched.n_examples.values()) == first
    train = load_examples(card, "train", tmp_path)
    if card.type == "classification":
        found = Counter(example.label for example in train)
        assert set(found) <= set(card.labels)
        assert len(found) >= min(len(card.labels), N * 3 // 5)
    for example in train:
        number = next(iter(example.fields.values())).split("第")[1].split("条")[0]
        assert all(f"第{number}条" in text for text in example.fields.values())
        if card.type == "extraction":
            assert [answer.text for answer in example.answers] == [f"第{number}条"]
        if card.type == "multiple_choice":
            assert example.label == int(number) % 4
            assert example.options[0] == f"选{number}"

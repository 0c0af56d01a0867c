"""Cards and data of tasks, in every format that data come in; the record that a fetch leaves; requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tuning_world import World

from fuzz.campaign import campaign, damaged_bytes, damaged_json, damaged_lines, damaged_toml
from mp2.json_files import check, read_object
from mp2.serve.request_body import read_json
from mp2.tasks import load_card
from mp2.tasks.data import load_examples
from mp2.tasks.fetch import _RECORD


def test_card(world: World, tmp_path: Path) -> None:
    path = tmp_path / "card.toml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        card = load_card(path)
        assert card.type in ("classification", "extraction", "multiple_choice")

    campaign("card", world.card.read_bytes(), read, (damaged_bytes, damaged_toml, damaged_toml))


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv"])
def test_data(world: World, tmp_path: Path, ending: str) -> None:
    card = load_card(world.card)
    rows = [json.loads(line) for line in (world.data / card.task / "train.jsonl").read_text().splitlines()][
        :20
    ]
    columns = list(rows[0])
    texts = {
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "json": json.dumps(rows, ensure_ascii=False),
        "csv": "\n".join([",".join(columns), *(",".join(f'"{row[c]}"' for c in columns) for row in rows)]),
        "tsv": "\n".join(["\t".join(columns), *("\t".join(str(row[c]) for c in columns) for row in rows)]),
    }
    path = tmp_path / f"train.{ending}"
    damages = {"jsonl": (damaged_lines, damaged_bytes), "json": (damaged_json, damaged_bytes)}

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for example in load_examples(card, "train", data=path):
            assert example.label in card.labels
            assert all(text.strip() and text.encode() for text in example.fields.values())

    campaign(f"data {ending}", texts[ending].encode(), read, damages.get(ending, (damaged_bytes,)))


def test_record_of_a_fetch(tmp_path: Path) -> None:
    path = tmp_path / "source.json"
    good = {"key": "a" * 64, "source": {"hub": "x"}, "examples": {"train": 3}, "remarks": ["b"]}

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check(read_object(path), _RECORD, path)

    campaign("fetch record", json.dumps(good).encode(), read)


def test_request() -> None:
    def read(data: bytes) -> None:
        read_json(data)

    campaign("request", json.dumps({"text": "好", "more": [1, 2.5, {"a": None}]}).encode(), read)

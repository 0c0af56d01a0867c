"""What comes over the network: answers of servers, requests to ours, archives and published formats."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuzz.campaign import campaign, damaged_bytes, damaged_json, json_damage
from mp2.engine.endpoint.client import Endpoints
from mp2.engine.endpoint.wire import message, tensors
from mp2.errors import Mp2Error
from mp2.serve.errors import RequestError
from mp2.serve.tensors import GraphLimits, read_infer
from mp2.tasks.download import member
from mp2.tasks.faults import FirstFault
from mp2.tasks.source_formats import source_records

FEEDS = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.array([[1, 1, 1]])}
FEEDS |= {"prompt_length": np.array([2]), "segments": np.zeros((1, 1, 2), np.int64)}
PROMPTS = {name: np.zeros((1, 2, 2, 2, 3), np.float32) for name in ("prompt_keys", "prompt_values")}
INTERFACE: dict[str, Any] = {
    "inputs": {
        **{name: {"dtype": "int64", "shape": ["N", "T"]} for name in ("input_ids", "attention_mask")},
        "prompt_length": {"dtype": "int64", "shape": ["P"]},
        "segments": {"dtype": "int64", "shape": ["N", "S", 2]},
        **{name: {"dtype": "float32", "shape": ["P", 2, 2, "m", 3]} for name in PROMPTS},
    },
    "outputs": {"start_logits": {"dtype": "float32", "shape": ["N", "T"]}},
}


class Damaged:
    """A message whose JSON, or whose bytes, are damaged; its length of JSON follows, or does not."""

    def __init__(self, head: bytes) -> None:
        self.head = head
        self.length: int = 0

    def __call__(self, rng: random.Random, data: bytes) -> bytes:
        size = len(self.head)
        if rng.random() < 0.7:
            head = json_damage(rng, json.loads(data[:size])).encode("utf-8", "surrogatepass")
        else:
            head = damaged_bytes(rng, data[:size])
        self.length = len(head) if rng.random() < 0.9 else rng.choice((0, -1, 2**70, size - 1))
        return head + (data[size:] if rng.random() < 0.8 else damaged_bytes(rng, data[size:]))


def test_answer_of_a_server() -> None:
    """What is accepted has the numbers of its shape; all else is one line, and no thread dies of it."""
    given = {"start_logits": np.ones((2, 3), np.float32), "ids": np.arange(4)}
    data, length = message({"model_name": "x"}, "outputs", given)
    damage = Damaged(data[:length])
    damage.length = length

    def read(data: bytes) -> None:
        found = tensors(data, damage.length, "outputs")
        for tensor in found.values():
            assert tensor.size < 100
            assert str(tensor.dtype) in ("float32", "int64")

    campaign("endpoint answer", data, read, (damage,))


def test_metadata_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {
        "inputs": [{"name": "prompt_keys", "shape": [-1, 2], "datatype": "FP32"}],
        "outputs": [],
        "parameters": {"backbone": "mini", "backbone_sha256": "a" * 64, "max_tokens": 4096},
    }
    said = b""
    endpoints = Endpoints(["http://localhost:1"], 1.0, lambda line: None)
    reply = ("mp2.engine.endpoint.client._exchange", lambda *_: (200, {}, said))
    monkeypatch.setattr(*reply)

    def read(data: bytes) -> None:
        nonlocal said
        said = data
        found = endpoints.metadata("backbone")
        assert all(isinstance(x["name"], str) and isinstance(x["shape"], list) for x in found["inputs"])
        assert int(found.get("parameters", {}).get("max_tokens", 1)) > 0

    campaign("endpoint metadata", json.dumps(good).encode(), read)


def test_request_for_tensors() -> None:
    """What is accepted fits the graph: no index outside of a table, no number that is none."""
    data, length = message({"id": "x"}, "inputs", {**FEEDS, **PROMPTS})
    damage = Damaged(data[:length])
    damage.length = length
    limits = GraphLimits(vocab_size=50, positions=16, max_tokens=64)

    def read(data: bytes) -> None:
        try:
            found = read_infer(data, str(damage.length), INTERFACE, limits)
        except RequestError as error:
            raise Mp2Error(str(error)) from error
        feeds = found.feeds
        assert set(feeds) == set(INTERFACE["inputs"])
        assert feeds["input_ids"].min() >= 0
        assert feeds["input_ids"].max() < 50
        assert all(np.isfinite(tensor).all() for tensor in feeds.values())
        assert feeds["input_ids"].shape == feeds["attention_mask"].shape

    campaign("tensors", data, read, (damage,))


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz"])
def test_archive(tmp_path: Path, kind: str) -> None:
    held = "一二三\n".encode() * 50
    packed = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as opened:
            opened.writestr("a/train.jsonl", held)
    else:
        with tarfile.open(fileobj=packed, mode="w:gz" if kind == "tar.gz" else "w:xz") as tar:
            info = tarfile.TarInfo("a/train.jsonl")
            info.size = len(held)
            tar.addfile(info, io.BytesIO(held))
    path, to = tmp_path / f"x.{kind}", tmp_path / "to"
    to.mkdir()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = member(path, "train.jsonl", to)
        assert found.parent == to
        assert kind != "zip" or found.read_bytes() == held, "a zip has a checksum"

    campaign(f"archive {kind}", packed.getvalue(), read, (damaged_bytes,))


@pytest.mark.parametrize("form", ["squad", "c3", "lines"])
def test_published_format(tmp_path: Path, form: str) -> None:
    answers = [{"text": "好", "answer_start": 1}]
    question = {"id": "1", "question": "什么", "answers": answers}
    squad = {"data": [{"paragraphs": [{"context": "很好吃", "qas": [question]}]}]}
    c3 = [[["甲：你好", "乙：好"], [{"question": "谁", "choice": ["甲", "乙"], "answer": "甲"}], "1"]]
    goods = {"squad": json.dumps(squad), "c3": json.dumps(c3), "lines": "好\tgood\n坏\tbad\n" * 5}
    path = tmp_path / "x.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for _, record in source_records(path, form, ("text", "label"), "\t", FirstFault()):
            assert isinstance(record, dict)

    damages = (damaged_bytes,) if form == "lines" else None
    campaign(f"format {form}", goods[form].encode(), read, damages or (damaged_bytes, damaged_json))

"""Fetching from a local server that stands in for the web: every format, with small files of our own."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import threading
import types
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mp2.errors import FormatError, Mp2Error, UsageError
from mp2.tasks import TaskCard, list_cards, load_card, load_examples
from mp2.tasks.download import download, member
from mp2.tasks.fetch import fetch_task
from mp2.tasks.source_formats import SOURCE_FORMATS
from tests.command_line import mp2, mp2_json

MakeCard = Callable[..., TaskCard]


class Web:
    """Files by path; what was asked for; ``cut``: bytes after which a connection breaks, once."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.cut: int | None = None
        self.ranges = True

    def put(self, path: str, data: bytes | str) -> str:
        self.files[f"/{path}"] = data.encode() if isinstance(data, str) else data
        return f"{self.address}/{path}"


@pytest.fixture
def web() -> Iterator[Web]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            site.asked.append((self.path, wanted))
            data = site.files.get(self.path)
            if data is None:
                self.send_error(404)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and site.ranges else 0
            if start and start >= len(data):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            cut, site.cut = site.cut, None
            self.wfile.write(data[start:cut])

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Web(server.server_port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


def zipped(**files: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, text in files.items():
            archive.writestr(name if "MACOSX" in name else name.replace("__", "/"), text)
    return held.getvalue()


def tarred(files: dict[str, str]) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return held.getvalue()


def _card(make_card: MakeCard, kind: str, text: str) -> TaskCard:
    last = 'c = "房"\n' if kind == "classification" else "version = 1\n"
    return make_card(kind, (last, last + text))


CSV = "label,review\r\n" + "".join(f'{i % 3},"今天, {i}"\r\n' for i in range(30))


def test_a_csv_file_becomes_lines_that_the_loader_reads(
    web: Web, make_card: MakeCard, tmp_path: Path
) -> None:
    source = (
        '[source]\nheld_out = 0.4\n[source.files]\ntrain = "URL"\n[source.fields]\ntext = "review"\n'
        '[source.labels]\n0 = "a"\n1 = "b"\n2 = "c"\n'
    ).replace("URL", web.put("x.csv", CSV))
    card = _card(make_card, "classification", source)
    fetched = fetch_task(card, tmp_path)
    train, test = (load_examples(card, split, tmp_path) for split in ("train", "test"))
    assert fetched.n_examples == {"train": len(train), "test": len(test)}
    assert len(train) + len(test) == 30
    assert {e.label for e in train} == {"a", "b", "c"}
    assert not {e.fields["text"] for e in train} & {e.fields["text"] for e in test}
    assert "40 % of train became it" in str(fetched)
    reordered = CSV.split("\r\n")
    web.put("x.csv", "\r\n".join([reordered[0], *reordered[:0:-1]]))
    again = fetch_task(card, tmp_path / "again")
    assert {e.fields["text"] for e in load_examples(card, "test", tmp_path / "again")} == {
        e.fields["text"] for e in test
    }
    assert again.n_examples == fetched.n_examples


def test_what_is_there_from_the_same_source_is_not_fetched_again(
    web: Web, make_card: MakeCard, tmp_path: Path
) -> None:
    line = json.dumps({"text": "今天", "label": "a"})
    card = _card(make_card, "classification", f'[source.files]\ntrain = "{web.put("x.jsonl", line)}"\n')
    assert fetch_task(card, tmp_path).new
    n_asked = len(web.asked)
    assert not fetch_task(card, tmp_path).new
    assert len(web.asked) == n_asked
    record = json.loads((tmp_path / "fruit" / "source.json").read_text("utf-8"))
    assert record["source"]["files"] == {"train": f"{web.address}/x.jsonl"}
    (tmp_path / "fruit" / "source.json").unlink()
    with pytest.raises(UsageError, match="has data that was not fetched; give another --to"):
        fetch_task(card, tmp_path)


def test_lines_in_an_archive_with_a_digest(web: Web, make_card: MakeCard, tmp_path: Path) -> None:
    data = zipped(**{"set__train.tsv": "今天\ta\n明天\tb\n后天\tc\n", "__MACOSX/set/train.tsv": "x"})
    address = web.put("set.zip", data)
    md5 = hashlib.md5(data).hexdigest()
    source = (
        f'[source]\nformat = "lines"\ncolumns = "text,label"\ndigests = {{ all = "md5:{md5}" }}\n'
        f'[source.files]\ntrain = "{address}#set/train.tsv"\n'
    )
    fetch_task(_card(make_card, "classification", source), tmp_path)
    assert [
        e.label for e in load_examples(_card(make_card, "classification", source), "train", tmp_path)
    ] == [
        "a",
        "b",
        "c",
    ]
    wrong = _card(make_card, "classification", source.replace(md5, "0" * 32))
    with pytest.raises(FormatError, match=rf"md5 is {md5}, expected 0{{32}}.*it was removed, try again"):
        fetch_task(wrong, tmp_path / "wrong")
    assert not list((tmp_path / "wrong" / ".downloads").iterdir())


def test_squad_in_a_tar_archive(web: Web, make_card: MakeCard, tmp_path: Path) -> None:
    questions = [
        {"question": "哪天", "answers": [{"text": "今天", "answer_start": 0}]},
        {"question": "什么", "answers": [{"text": "天气", "answer_start": 9}]},
        {"question": "谁", "answers": [], "is_impossible": True},
    ]
    text = json.dumps({"data": [{"paragraphs": [{"context": "今天天气", "qas": questions}]}]})
    address = web.put("set.tar.gz", tarred({"set/train.json": text}))
    card = _card(
        make_card,
        "extraction",
        f'unanswerable = true\n[source]\nformat = "squad"\n[source.files]\ntrain = "{address}#train.json"\n',
    )
    fetch_task(card, tmp_path)
    examples = load_examples(card, "train", tmp_path)
    assert [[(a.text, a.start) for a in e.answers] for e in examples] == [[("今天", 0)], [("天气", 2)], []]


def test_dialogues_of_c3_in_two_files(web: Web, make_card: MakeCard, tmp_path: Path) -> None:
    def part(name: str) -> str:
        question = {"question": f"谁{name}", "choice": ["男", "女"], "answer": "女"}
        return web.put(f"{name}.json", json.dumps([[["男：好", "女：不"], [question], "1"]]))

    source = (
        '[source]\nformat = "c3"\nfields = { options = "choice", label = "answer" }\n'
        f'[source.files]\ntrain = "{part("m")} {part("d")}"\n'
    )
    card = _card(make_card, "multiple_choice", source)
    fetch_task(card, tmp_path)
    first, second = load_examples(card, "train", tmp_path)
    assert (first.fields["context"], first.label, second.fields["question"]) == ("男：好 女：不", 1, "谁d")


def test_other_separators_and_an_array_in_an_archive(web: Web, make_card: MakeCard, tmp_path: Path) -> None:
    source = (
        '[source]\nformat = "lines"\ncolumns = "text,label"\nseparator = "_!_"\n'
        f'[source.files]\ntrain = "{web.put("t.txt", "今天_!_a")}"\n'
    )
    fetch_task(_card(make_card, "classification", source), tmp_path / "1")
    records = json.dumps([{"query": "今天", "label": "b"}])
    address = web.put("t.zip", zipped(**{"T__T_train.json": records}))
    source = f'[source]\nfields = {{ text = "query" }}\n[source.files]\ntrain = "{address}#T/T_train.json"\n'
    card = _card(make_card, "classification", source)
    fetch_task(card, tmp_path / "2")
    assert load_examples(card, "train", tmp_path / "2")[0].label == "b"


def test_a_download_that_was_cut_off_goes_on_where_it_ended(web: Web, tmp_path: Path) -> None:
    data = bytes(range(256)) * 500
    address = web.put("big.bin", data)
    web.cut = 70_000
    with pytest.raises(Mp2Error, match=r"cut off after \d+ of 128000 bytes; run it again|IncompleteRead"):
        download(address, tmp_path)
    (partial,) = tmp_path.iterdir()
    had = partial.stat().st_size
    assert 0 < had <= 70_000
    assert download(address, tmp_path).read_bytes() == data
    assert web.asked[-1] == ("/big.bin", f"bytes={had}-")
    assert [p.name.endswith(".part") for p in tmp_path.iterdir()] == [False]
    n_asked = len(web.asked)
    assert download(address, tmp_path).read_bytes() == data
    assert len(web.asked) == n_asked


def test_a_server_that_cannot_go_on_sends_it_all_again(web: Web, tmp_path: Path) -> None:
    address = web.put("big.bin", b"0123456789")
    web.cut, web.ranges = 4, False
    with pytest.raises(Mp2Error):
        download(address, tmp_path)
    assert download(address, tmp_path).read_bytes() == b"0123456789"


def test_what_is_wrong_with_the_web_is_said(web: Web, tmp_path: Path) -> None:
    with pytest.raises(Mp2Error, match="nothing: 404"):
        download(f"{web.address}/nothing", tmp_path)
    with pytest.raises(Mp2Error, match="be online, or run it again"):
        download("http://127.0.0.1:1/x", tmp_path)
    with pytest.raises(UsageError, match="expected http"):
        download("file:///etc/passwd", tmp_path)
    archive = download(web.put("a.zip", zipped(a="1")), tmp_path)
    with pytest.raises(FormatError, match="has 0 files b, expected one"):
        member(archive, "b", tmp_path)
    with pytest.raises(FormatError, match="not a zip or tar archive"):
        member(download(web.put("no.zip", b"no"), tmp_path), "b", tmp_path)


def test_a_source_that_is_not_what_the_card_says_is_refused(
    web: Web, make_card: MakeCard, tmp_path: Path
) -> None:
    address = web.put("x.csv", CSV)  # its labels are 0 to 2, the card's a to c
    source = f'[source]\nfields = {{ text = "review" }}\n[source.files]\ntrain = "{address}"\n'
    card = _card(make_card, "classification", source)
    with pytest.raises(
        UsageError, match=r"30 of 30 train examples are not what the card says; the first: .*label"
    ):
        fetch_task(card, tmp_path)
    assert not (tmp_path / "fruit").exists()


def test_counts_and_labels_that_differ_are_said(web: Web, make_card: MakeCard, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"今天{i}", "label": "ab"[i % 2]}) + "\n" for i in range(10))
    source = (
        "[source]\ncounts = { train = 1000, test = 50 }\n"
        f'[source.files]\ntrain = "{web.put("x.jsonl", lines)}"\n'
    )
    fetched = fetch_task(_card(make_card, "classification", source), tmp_path)
    assert fetched.remarks == (
        "train has 10 examples, expected about 1,000",
        "test has 0 examples, expected about 50",
        "train has no example of c",
    )


def test_hub_sets_are_written_as_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Rows(list[Any]):
        features: dict[str, Any] = {}  # noqa: RUF012

    def load_dataset(name: str, config: str | None = None, *, split: str) -> Rows:
        assert (name, split) == ("dirtycomputer/weibo_senti_100k", "train")
        return Rows({"label": i % 2, "review": f"今天{i}"} for i in range(40))

    stub = types.ModuleType("datasets")
    stub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    card = load_card("weibo_sentiment")
    fetched = fetch_task(card, tmp_path)
    assert sum(fetched.n_examples.values()) == 40
    assert {e.label for e in load_examples(card, "train", tmp_path)} == {"正面", "负面"}


def test_the_command_loads_several_and_says_which_failed(
    web: Web, card_toml: dict[str, str], tmp_path: Path
) -> None:
    line = json.dumps({"text": "今天", "label": "a"})
    for name, address in (("one", web.put("x.jsonl", line)), ("two", f"{web.address}/nothing.jsonl")):
        text = card_toml["classification"].replace('"fruit"', f'"{name}"')
        (tmp_path / f"{name}.toml").write_text(f'{text}[source.files]\ntrain = "{address}"\n', "utf-8")
    cards = [str(tmp_path / f"{name}.toml") for name in ("two", "one")]
    done = mp2("tasks", "fetch", *cards, "--to", tmp_path / "data")
    assert done.exit_code == 1
    assert "fetching two" in done.stderr
    assert "404" in done.stderr
    assert "one: 1 train" in done.stdout
    done = mp2("tasks", "fetch", "amazon", "--to", tmp_path / "data")
    assert done.exit_code == 2
    assert "no public source that can be loaded; see https://github.com/SophonPlus/" in done.stderr
    assert f"put your copy in {tmp_path / 'data' / 'amazon'}" in done.stderr


def test_every_card_has_a_source_or_says_what_to_do() -> None:
    for card in list_cards():
        if card.task.startswith("demo_"):
            continue
        source = card.source
        assert source is not None, card.task
        assert source.hub or source.files or source.note, card.task
        assert source.licence, card.task
        for split, addresses in source.files.items():
            for address in addresses.split():
                assert address.startswith("https://"), (card.task, split)
        if source.files:
            assert "train" in source.files
            assert source.format in SOURCE_FORMATS
            assert bool(source.columns) == (source.format == "lines"), card.task
        assert set(source.labels.values()) <= set(card.labels), card.task
        keys = {*card.fields, *card.gold_keys}
        assert set(source.fields) <= keys, card.task
        if source.columns:
            assert keys <= set(source.columns.split(",")), card.task
    assert len(mp2_json("tasks", "sources")) == len(list_cards())

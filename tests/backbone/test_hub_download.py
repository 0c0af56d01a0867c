"""Loading from the hub, from a stand-in on this machine that speaks as much of its API as is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mp2.backbone import Backbone, save_backbone

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import json, sys
from mp2.backbone import load_backbone
from mp2.errors import Mp2Error
for arguments in json.loads(sys.argv[1]):
    try:
        backbone = load_backbone(arguments[0], revision=arguments[1])
        print(json.dumps([backbone.name, backbone.sha256, backbone.revision]))
    except Mp2Error as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a dictionary of files; remembers what was fetched."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: str) -> None:
        self.answer(404, b"{}", X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = about or file
        assert found is not None, path
        files = self.server.repos.get(found[1])
        if files is None:
            self.refuse("RepoNotFound")
        elif about:
            if about[3] not in (None, "main", COMMIT):
                self.refuse("RevisionNotFound")
                return
            listing: Any = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in files.items()
            ]
            if about[2] != "tree":
                siblings = [{"rfilename": name} for name in files]
                listing = {
                    "_id": "0",
                    "id": about[1],
                    "modelId": about[1],
                    "sha": COMMIT,
                    "siblings": siblings,
                }
            self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")
        elif file and file[3] in files:
            if self.command == "GET":
                self.server.fetched.append(f"{file[1]}/{file[3]}")
            content = files[file[3]]
            self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        else:
            self.refuse("EntryNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def load_elsewhere(
    endpoint: str, home: Path, *wanted: tuple[str, str | None], offline: bool = False
) -> list[list[str]]:
    """Name and hash, or error and message, of each (backbone, revision) in a process of its own."""
    kept = {
        k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")
    }
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(wanted)],
        env={**kept, **settings, **quiet},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_checkpoints_are_fetched_once_and_only_the_files_that_are_read(
    tiny_backbone: Backbone, tmp_path: Path, hub: Hub
) -> None:
    save_backbone(tiny_backbone, tmp_path / "b")
    modern = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    unread = {"README.md": b"#", "tf_model.h5": b"0" * 99, "flax_model.msgpack": b"0" * 99}
    hub.repos["somebody/tiny-bert"] = {**modern, **unread, "pytorch_model.bin": b"not asked for"}
    torch.save(load_file(tmp_path / "b" / "model.safetensors"), tmp_path / "b" / "pytorch_model.bin")
    old = {**modern, **unread, "pytorch_model.bin": (tmp_path / "b" / "pytorch_model.bin").read_bytes()}
    del old["model.safetensors"]
    hub.repos["hfl/chinese-macbert-base"] = old
    home = tmp_path / "home"
    wanted = [
        ("somebody/tiny-bert", None),
        ("macbert-base", "main"),
        ("nobody/nothing", None),
        ("somebody/tiny-bert", "v9"),
    ]
    modern_got, old_got, unknown, revision = load_elsewhere(hub.url, home, *wanted)
    assert modern_got == ["tiny-bert", tiny_backbone.sha256, COMMIT]  # what a revision, or none, stands for
    assert old_got == ["macbert-base", tiny_backbone.sha256, COMMIT]
    assert unknown[0] == "UnknownNameError"
    assert "unknown backbone 'nobody/nothing'" in unknown[1]
    assert "The hub has no nobody/nothing" in unknown[1]
    assert revision[0] == "UnknownNameError"
    assert "unknown revision 'v9'" in revision[1]
    assert sorted(set(hub.fetched)) == sorted(hub.fetched)
    assert {Path(name).name for name in hub.fetched} == {
        "config.json",
        "vocab.txt",
        "model.safetensors",
        "pytorch_model.bin",
    }
    assert "somebody/tiny-bert/pytorch_model.bin" not in hub.fetched

    before = list(hub.fetched)
    again = load_elsewhere(hub.url, home, ("macbert-base", None), ("bert-base-chinese", None), offline=True)
    assert again[0] == old_got  # from the cache
    assert hub.fetched == before
    assert again[1][0] == "MissingDependencyError"
    for part in ("'bert-base-chinese'", "cannot be reached", "local checkpoint folder", "--backbone mini"):
        assert part in again[1][1]


def test_an_unreachable_hub_is_a_missing_dependency_that_names_both_ways(tmp_path: Path) -> None:
    [[kind, message]] = load_elsewhere("http://127.0.0.1:9", tmp_path, ("cpt-large", None))
    assert kind == "MissingDependencyError"
    assert "fnlp/cpt-large" in message
    assert "local checkpoint folder" in message
    assert "--backbone mini" in message

"""A bundle of four tasks on the embedded backbone, and servers of it in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from export.test_bundle import CHOICE, EXTRACTION, make_run
from serving import Server, start_server

from mp2.export import write_bundle


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Deep and shallow prompts, three kinds of tasks."""
    folder = tmp_path_factory.mktemp("served_runs")
    return {
        "demo_topic": make_run(folder / "topic", "demo_topic", "mini-deep", max_tokens=100),
        "demo_sentiment": make_run(folder / "sentiment", "demo_sentiment", "mini-shallow"),
        "choice": make_run(folder / "choice", CHOICE, "mini-deep", max_tokens=80),
        "finding": make_run(folder / "finding", EXTRACTION, "mini-deep", max_tokens=60),
    }


@pytest.fixture(scope="session")
def bundle(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served_bundle") / "bundle"
    write_bundle(list(runs.values()), out)
    return out


@pytest.fixture
def start(bundle: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers of the bundle with some options; they are gone at the end."""
    servers: list[Server] = []

    def started(*options: str) -> Server:
        servers.append(start_server(bundle, tmp_path / f"log{len(servers)}", *options))
        return servers[-1]

    yield started
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that tests share."""
    started = start_server(bundle, tmp_path_factory.mktemp("server") / "log", "--timeout-s", "20")
    yield started
    started.kill()

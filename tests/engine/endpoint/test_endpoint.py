"""Tuning through servers: the losses and runs of a local backend, whatever becomes of the servers."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import mp2, mp2_json
from serving import Server, start_server

from mp2.backbone import Backbone, load_backbone
from mp2.backbone.mlm_head import MlmHead
from mp2.engine import Backend, Objective, Scorer, create_backend
from mp2.engine.endpoint.backend import EndpointBackend
from mp2.engine.endpoint.client import EndpointError, Endpoints
from mp2.errors import MismatchError, UsageError
from mp2.export import export_engine
from mp2.heads import LabelWordHead, RidgeHead, RidgePart, RidgeSettings
from mp2.prompts import load_prompts, random_prompts
from mp2.tasks import FieldFormatter, MrcFormatter, MrcInput, few_shot_split, load_card, load_examples


@pytest.fixture(scope="session")
def mini() -> Backbone:
    return load_backbone("mini")


@pytest.fixture(scope="session")
def engine(mini: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_engine(mini, tmp_path_factory.mktemp("served_engine") / "engine").path


@pytest.fixture(scope="session")
def served(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(engine, tmp_path_factory.mktemp("endpoint") / "log")
    yield server
    server.kill()


def inputs_of(task: str, kind: type[Any], backbone: Backbone) -> list[Any]:
    card = load_card(task)
    split = few_shot_split(card, load_examples(card, "train"), seed=8)
    formatter = kind(card, backbone.tokenizer, 128)
    return [made for i, e in enumerate(split.train[:12]) for made in formatter.training_inputs(e, i)]


def losses_of(backend: Backend, prompts: str, head: Any, inputs: list[Any]) -> list[np.ndarray]:
    """Full losses, visits of every second layer after commits, and the probabilities of answers."""
    prompt_set = load_prompts(prompts, backend.backbone)
    forward = backend.forward(prompt_set, head)
    objective = Objective(forward, inputs)
    rng = np.random.default_rng(3)
    n_layers, _, d = prompt_set.z.shape
    z = rng.normal(0, 0.3, (3, n_layers, d))
    found = [objective.full_losses(z).fetch()]
    objective.set_incumbent(z[0])
    for layer in range(0, n_layers, 2):
        candidates = z[0, layer] + rng.normal(0, 0.3, (4, d))
        found.append(objective.layer_losses(layer, candidates).fetch())
        objective.commit(layer, candidates[1])
    outputs = Scorer(forward).outputs(z[1], inputs).fetch()
    reader = objective.reader(z[1])
    for item, output in zip(inputs, outputs, strict=True):
        scores = np.asarray(reader.scores(item, output), dtype=float)
        found.append(np.exp(scores - np.logaddexp.reduce(scores)))
    return found


@pytest.mark.parametrize("prompts", ["mini-deep", "mini-shallow"])
@pytest.mark.parametrize("head", ["span", "ridge"])
def test_losses_are_those_of_the_local_backend(
    served: Server, mini: Backbone, prompts: str, head: str
) -> None:
    inputs = inputs_of("demo_topic", MrcFormatter if head == "span" else FieldFormatter, mini)
    reader: Any = None
    if head == "ridge":
        parts = (RidgePart(share=0.5, penalty=0.1, weight=4.0),)
        settings = RidgeSettings(layer=3, ngrams=True, parts=parts)
        reader = RidgeHead(inputs, 10, settings)
    backend = create_backend("auto", mini, endpoint=served.url)
    assert (backend.name, backend.precision, backend.device) == ("endpoint", "fp32", "cpu")
    there = losses_of(backend, prompts, reader, inputs)
    here = losses_of(create_backend("torch", mini), prompts, reader, inputs)
    assert len(there) == len(here)
    for a, b in zip(there, here, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_label_words_are_read_from_their_masks_alone(tiny_backbone: Backbone, tmp_path: Path) -> None:
    folder = export_engine(tiny_backbone, tmp_path / "engine").path
    server = start_server(folder, tmp_path / "log")
    prompts = random_prompts(tiny_backbone, "deep", prompt_tokens=4, intrinsic_dim=6, tasks=("t",), scale=2.0)
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, tiny_backbone.config.vocab_size, n) for n in (9, 12, 9, 7)]
    inputs = [
        MrcInput(k, x, 0, 0, np.empty((0, 2), np.int64), label=k % 3, segments=np.array([[1, n]]))
        for k, x in enumerate(ids)
        for n in (1, 2)
    ]
    h, v = tiny_backbone.config.hidden, tiny_backbone.config.vocab_size
    words = torch.randn(v, h, generator=torch.Generator().manual_seed(1))
    mlm = MlmHead(transform=None, decoder=words, bias=torch.zeros(v), tied=False)
    head = LabelWordHead(mlm, [[7, 8], [9], [10]], inputs)
    z = rng.normal(0, 1.0, (5, 3, 6))
    try:
        there, here = (
            Objective(backend.forward(prompts, head), inputs).full_losses(z).fetch()
            for backend in (
                EndpointBackend(tiny_backbone, server.url),
                create_backend("torch", tiny_backbone),
            )
        )
    finally:
        server.kill()
    assert np.ptp(here) > 1e-3
    np.testing.assert_allclose(there, here, atol=1e-5)


ASK = [
    "--task",
    "demo_sentiment",
    "--iters",
    "60",
    "--router-iters",
    "20",
    "--no-baselines",
    "--threads",
    "1",
]


def journal_losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text("utf-8").splitlines()]
    return [record["loss"] for record in records if record.get("event") == "losses"]


@pytest.fixture(scope="session")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = mp2_json("bbt", *ASK, "--out", tmp_path_factory.mktemp("local"))
    assert len(journal_losses(Path(found["run_dir"]))) == 60
    return found


def test_a_run_through_two_servers_is_the_local_one(
    served: Server, engine: Path, local_run: dict[str, Any], tmp_path: Path
) -> None:
    other = start_server(engine, tmp_path / "log")
    try:
        urls = f"{served.url},{other.url}"
        found = mp2_json("bbt", *ASK, "--endpoint", urls, "--out", tmp_path)
        for server in (served, other):  # both had work
            assert "infer" in server.send("GET", "/metrics")[2].decode()
    finally:
        other.kill()
    np.testing.assert_allclose(
        journal_losses(Path(found["run_dir"])), journal_losses(Path(local_run["run_dir"])), atol=1e-5
    )
    assert found["engine"]["runtime"] == "endpoint"
    done = mp2("predict", "--run", found["run_dir"], "--input", "-", input="很好吃\n")
    assert done.exit_code == 0  # without a server: here
    assert "labelling with torch" in done.stderr


def test_a_bundle_is_an_endpoint_too(bundle_of_one: Path, mini: Backbone, tmp_path: Path) -> None:
    server = start_server(bundle_of_one, tmp_path / "log")
    try:
        inputs = inputs_of("demo_topic", MrcFormatter, mini)
        there = losses_of(create_backend("endpoint", mini, endpoint=server.url), "mini-deep", None, inputs)
    finally:
        server.kill()
    here = losses_of(create_backend("torch", mini), "mini-deep", None, inputs)
    np.testing.assert_allclose(np.concatenate(there[:3]), np.concatenate(here[:3]), atol=1e-5)


@pytest.fixture(scope="session")
def bundle_of_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from export.test_bundle import make_run

    from mp2.export import write_bundle

    folder = tmp_path_factory.mktemp("one")
    write_bundle([make_run(folder / "run", "demo_topic", "mini-deep", max_tokens=100)], folder / "bundle")
    return folder / "bundle"


Begin = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Start a run through a server, in a process of its own."""
    processes: list[subprocess.Popen[bytes]] = []

    def started(out: Path, url: str, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mp2", "bbt", *ASK, "--endpoint", url, "--out", str(out), *more]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE))
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def wait_for_losses(out: Path, n: int) -> Path:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for run in out.glob("*/journal.jsonl"):
            try:
                if len(journal_losses(run.parent)) >= n:
                    return run.parent
            except ValueError:  # a line is being written
                pass
        time.sleep(0.02)
    raise AssertionError("no losses in time")


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_changes_nothing(
    begin: Begin, engine: Path, local_run: dict[str, Any], tmp_path: Path
) -> None:
    server = start_server(engine, tmp_path / "log")
    process = begin(tmp_path / "runs", server.url)
    run = wait_for_losses(tmp_path / "runs", 10)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait(60)
    time.sleep(0.5)
    again = start_server(engine, tmp_path / "log2", "--port", str(server.port))
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        again.kill()
    assert process.returncode == 0, errors
    np.testing.assert_allclose(journal_losses(run), journal_losses(Path(local_run["run_dir"])), atol=1e-5)


@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_run_and_resume_goes_on(
    begin: Begin, engine: Path, local_run: dict[str, Any], tmp_path: Path
) -> None:
    server = start_server(engine, tmp_path / "log")
    process = begin(tmp_path / "runs", server.url, "--endpoint-patience-s", "1.5")
    run = wait_for_losses(tmp_path / "runs", 10)
    server.kill()
    _, errors = process.communicate(timeout=240)
    text = errors.decode()
    assert process.returncode == 1, text
    assert f"{server.url} did not answer for 1.5 s" in text
    assert "Traceback" not in text
    done = journal_losses(run)  # whole: every line is JSON
    assert 10 <= len(done) < len(journal_losses(Path(local_run["run_dir"])))
    again = start_server(engine, tmp_path / "log2", "--port", str(server.port))
    try:
        resumed = mp2("bbt", "--resume", run)
    finally:
        again.kill()
    assert resumed.exit_code == 0, resumed.output
    np.testing.assert_allclose(journal_losses(run), journal_losses(Path(local_run["run_dir"])), atol=1e-5)


class Moody(BaseHTTPRequestHandler):
    """Answers 429, breaks off, then answers."""

    protocol_version = "HTTP/1.1"
    answers: list[Any]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.answers.pop(0) if self.answers else 200
        if answer == "break":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = b'{"error": "later"}'
        if answer == 200:
            body = json.dumps(
                {"outputs": [{"name": "y", "shape": [1], "datatype": "FP32", "data": [7.0]}]}
            ).encode()
        self.send_response(answer)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def moody() -> Iterator[Callable[[list[Any]], str]]:
    servers = []

    def start(answers: list[Any]) -> str:
        handler = type("Handler", (Moody,), {"answers": answers})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_what_may_be_answered_later_is_asked_again(moody: Callable[[list[Any]], str]) -> None:
    answers: list[Any] = [429, "break", 503, 504]
    lines: list[str] = []
    servers = Endpoints([moody(answers)], 30, lines.append)
    found = servers.infer("m", {"x": np.zeros(3, np.float32)}, ["y"]).result(60)
    assert found["y"].tolist() == [7.0]
    assert answers == []
    assert len(lines) == 2  # that it does not answer, and that it does again


def test_what_is_refused_is_not_asked_again(moody: Callable[[list[Any]], str]) -> None:
    answers: list[Any] = [400, 200]
    servers = Endpoints([moody(answers)], 30, lambda line: None)
    with pytest.raises(EndpointError, match=r"refuses a request \(status 400\): later"):
        servers.infer("m", {"x": np.zeros(3, np.float32)}, ["y"]).result(60)
    assert answers == [200]


def test_what_cannot_be_sent_is_heard_of_and_the_threads_go_on(moody: Callable[[list[Any]], str]) -> None:
    servers = Endpoints([moody([])], 30, lambda line: None)
    for _ in range(3):  # more than there are threads
        with pytest.raises(KeyError, match="float64"):
            servers.infer("m", {"x": np.zeros(3, np.float64)}, ["y"]).result(20)
    assert servers.infer("m", {"x": np.zeros(3, np.float32)}, ["y"]).result(20)["y"].tolist() == [7.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--endpoint", "ftp://x:1"], "--endpoint ftp://x:1: expected http://HOST:PORT"),
        (["--endpoint", "http://x:99999"], "--endpoint http://x:99999: Port out of range"),
        (["--endpoint", "URL", "--engine", "ENGINE"], "drop --runtime, --engine and --device"),
        (["--endpoint", "URL", "--runtime", "torch"], "drop --runtime, --engine and --device"),
        (["--runtime", "endpoint"], "give --endpoint URL"),
        (["--endpoint", "URL", "--precision", "bf16"], "computes in fp32, expected bf16"),
        (["--endpoint", "URL", "--endpoint-patience-s", "0"], "endpoint_patience_s is 0.0"),
    ],
)
def test_wrong_commands_exit_2(
    served: Server, engine: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    known = {"URL": served.url, "ENGINE": str(engine)}
    done = mp2("bbt", *ASK, *(known.get(word, word) for word in words), "--out", tmp_path)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_backbones_server_is_refused(served: Server, tiny_backbone: Backbone) -> None:
    with pytest.raises(MismatchError, match=r"serves backbone 'mini' .* expected 'tiny'"):
        EndpointBackend(tiny_backbone, served.url)


def test_nobody_there_is_said_after_the_patience(mini: Backbone) -> None:
    with pytest.raises(EndpointError, match=r"http://127\.0\.0\.1:9 did not answer for 0\.2 s"):
        EndpointBackend(mini, "http://127.0.0.1:9", patience_s=0.2)


def test_a_server_of_something_else_is_refused(mini: Backbone, moody: Callable[[list[Any]], str]) -> None:
    with pytest.raises(UsageError, match=r"/v2/models/backbone is not there \(status 501"):
        EndpointBackend(mini, moody([]), patience_s=0.2)


def test_an_engine_folder_below_float32_has_no_whole_graphs_to_serve(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    export_engine(tiny_backbone, tmp_path / "half", precision="fp16")
    done = mp2("serve", "--bundle", tmp_path / "half")
    assert done.exit_code == 2
    assert "an engine folder without whole graphs" in done.stderr
    shutil.rmtree(tmp_path / "half")

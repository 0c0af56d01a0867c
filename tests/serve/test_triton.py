"""The real Triton server, where there is one: it serves a bundle's graph, and mp2 tunes through it.

MP2_TRITON_PYTHON names an interpreter with nvidia-pytriton, onnxruntime and numpy (default: this one).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mp2.backbone import load_backbone
from mp2.engine import Objective, create_backend
from mp2.export.bundle_files import reading
from mp2.prompts import load_prompts
from mp2.tasks import MrcFormatter, few_shot_split, load_card, load_examples

PYTHON = os.environ.get("MP2_TRITON_PYTHON", sys.executable)
SERVER = Path(__file__).with_name("triton_server.py")


def has_triton() -> bool:
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('pytriton') is None)"
    return subprocess.run([PYTHON, "-c", check], capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_triton(), reason="nvidia-pytriton is not installed (or MP2_TRITON_PYTHON)"),
]


@pytest.fixture(scope="module")
def triton(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = tmp_path_factory.mktemp("triton") / "log"
    library = subprocess.run(
        [PYTHON, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    environment["LD_LIBRARY_PATH"] = library
    with log.open("wb") as file:
        process = subprocess.Popen(
            [PYTHON, str(SERVER), str(bundle), str(port)],
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 180
    try:
        while True:
            assert process.poll() is None, log.read_text("utf-8", "replace")[-2000:]
            assert time.monotonic() < until, log.read_text("utf-8", "replace")[-2000:]
            try:
                with urllib.request.urlopen(f"{url}/v2/models/backbone/ready", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def test_triton_gives_what_the_graph_gives(triton: str, bundle: Path) -> None:
    http = pytest.importorskip("tritonclient.http")
    import onnxruntime

    tokenizer, tasks = reading.load(bundle)
    row = reading.rows(tokenizer, tasks["demo_topic"], {"text": "球队在最后一分钟进球"})[0]
    feeds = reading.feeds([tasks["demo_topic"]], [row])
    expected = onnxruntime.InferenceSession(bundle / "backbone.onnx").run(["start_logits"], feeds)[0]
    feeds["prompt_length"] = feeds["prompt_length"][:, None]
    inputs = []
    for name, x in feeds.items():
        inputs.append(http.InferInput(name, list(x.shape), "INT64" if x.dtype == np.int64 else "FP32"))
        inputs[-1].set_data_from_numpy(x)
    client = http.InferenceServerClient(triton.removeprefix("http://"))
    found = client.infer("backbone", inputs).as_numpy("start_logits")
    client.close()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_mp2_tunes_through_triton(triton: str) -> None:
    backbone = load_backbone("mini")
    card, prompts = load_card("demo_topic"), load_prompts("mini-deep", backbone)
    split = few_shot_split(card, load_examples(card, "train"), seed=8)
    formatter = MrcFormatter(card, backbone.tokenizer, 128)
    inputs = [formatter.training_input(example, i) for i, example in enumerate(split.train[:8])]
    z = np.random.default_rng(1).normal(0, 0.3, (3, prompts.z.shape[0], prompts.z.shape[2]))
    there, here = (
        Objective(backend.forward(prompts), inputs).full_losses(z).fetch()
        for backend in (
            create_backend("endpoint", backbone, endpoint=triton),
            create_backend("torch", backbone),
        )
    )
    np.testing.assert_allclose(there, here, atol=1e-5)

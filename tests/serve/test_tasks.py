"""What the server answers is what ``mp2 predict`` answers; what it cannot answer it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command_line import mp2
from export.test_bundle import predicted
from serving import Server

TEXTS = ["球队在最后一分钟进球", "这家店的菜很好吃", "戴隐形眼镜洗澡，小心角膜感染", "太差了，失望" * 60]


def lines_of(task: str) -> list[dict[str, Any]]:
    if task.startswith("demo"):
        return [{"text": text} for text in TEXTS]
    own: list[dict[str, Any]] = [
        {"context": text, "question": "他喜欢什么" * (1 + k)} for k, text in enumerate(TEXTS)
    ]
    options = {"options": ["天气", "旅游，美食", "体育"]} if task == "choice" else {}
    return [{**line, **options} for line in own]


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    close = abs(found["probability"] - expected["probability"]) <= 1e-5
    return close and {**found, "probability": 0} == {**expected, "probability": 0}


def test_answers_are_those_of_predict_with_all_tasks_at_once(server: Server, runs: dict[str, Path]) -> None:
    asked = [(task, line) for task in runs for line in lines_of(task)]
    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(lambda one: server.ask(f"/v1/tasks/{one[0]}", one[1]), asked))
    expected = [answer for task, run in runs.items() for answer in predicted(run, lines_of(task))]
    assert [status for status, _ in found] == [200] * len(asked)
    for (_, answer), wanted in zip(found, expected, strict=True):
        assert same(answer, wanted), (answer, wanted)


def test_a_list_of_lines_gets_a_list_of_answers(server: Server, runs: dict[str, Path]) -> None:
    for task, run in runs.items():
        status, answers = server.ask(f"/v1/tasks/{task}", lines_of(task))
        assert status == 200
        for answer, wanted in zip(answers, predicted(run, lines_of(task)), strict=True):
            assert same(answer, wanted), (answer, wanted)
    assert server.ask("/v1/tasks/demo_topic", []) == (200, [])


def test_it_says_which_tasks_there_are(server: Server, runs: dict[str, Path]) -> None:
    _, found = server.ask("/v1/tasks")
    assert [task["name"] for task in found["tasks"]] == list(runs)
    assert server.ask("/v1/tasks/demo_sentiment")[1]["labels"] == ["negative", "positive"]
    assert server.ask("/v1/tasks/choice")[1]["fields"] == ["context", "question", "options"]


@pytest.mark.parametrize(
    ("task", "body", "status", "field", "message"),
    [
        ("demo_topic", b'{"text"', 400, None, "not JSON: .* at line 1, column 8"),
        ("demo_topic", b"\xff", 400, None, "not UTF-8"),
        ("demo_topic", b"", 400, None, "not JSON"),
        ("demo_topic", b'{"text": NaN}', 400, None, "NaN, which is no number"),
        ("demo_topic", b"[" * 100_000, 400, None, "nested too deeply"),
        ("demo_topic", b'{"text": ' + b"7" * 5000 + b"}", 400, None, "too many digits"),
        ("demo_topic", b"7", 400, None, "got 7, expected an object with text"),
        ("demo_topic", b"{}", 400, "text", "missing; task 'demo_topic' needs text"),
        ("demo_topic", b'{"text": 7}', 400, "text", "got 7, expected a string"),
        ("demo_topic", b'{"text": {"a": 1}}', 400, "text", "got an object, expected a string"),
        ("demo_topic", b'{"text": " \\n"}', 400, "text", "empty"),
        ("demo_topic", b'{"text": "\\ud800"}', 400, "text", "surrogate"),
        ("demo_topic", b'{"text": "x", "\\ud800": 1}', 400, None, "unknown; task 'demo_topic' has text"),
        ("demo_topic", b'{"text": "x", "txet": 1}', 400, "txet", "unknown; task 'demo_topic' has text"),
        ("demo_topic", b'[{"text": "x"}, {"text": null}]', 400, "[1].text", "got null"),
        ("demo_topik", b'{"text": "x"}', 404, None, "Did you mean 'demo_topic'"),
        ("choice", b'{"context": "x", "question": "y"}', 400, "options", "missing"),
        ("choice", b'{"context": "x", "question": "y", "options": ["a"]}', 400, "options", "at least 2"),
        ("choice", b'{"context": "x", "question": "y", "options": ["a", 3]}', 400, "options[1]", "got 3"),
        ("choice", b'{"context": "x", "question": "y", "options": ["a", "a"]}', 400, "options[1]", "repeats"),
        ("finding", b'{"context": "", "question": "y"}', 400, "context", "empty"),
    ],
)
def test_bad_lines_are_answered_with_what_is_wrong(
    server: Server, task: str, body: bytes, status: int, field: str | None, message: str
) -> None:
    got, _, data = server.send("POST", f"/v1/tasks/{task}", body)
    answer = json.loads(data)
    assert got == status, answer
    assert re.search(message, answer["error"]), answer
    if field:
        assert answer["field"] == field


def test_options_that_fill_the_sequence_are_named(server: Server) -> None:
    line = {"context": "天" * 50, "question": "y", "options": ["天" * 90, "地"]}
    status, answer = server.ask("/v1/tasks/choice", line)
    assert (status, answer["field"]) == (400, "options")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("DELETE", "/v1/tasks/demo_topic", 405), ("GET", "/v1/tasks/x", 404)],
)
def test_other_paths_and_methods_are_refused_in_json(
    server: Server, method: str, path: str, status: int
) -> None:
    got, headers, data = server.send(method, path)
    assert got == status
    assert headers["content-type"] == "application/json"
    assert json.loads(data)["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bundle", "nowhere"], "no manifest.json: not a bundle"),
        (["--bundle", "BUNDLE", "--host", "no such host"], "--host no such host: "),
        (["--bundle", "BUNDLE", "--port", "TAKEN"], "give another --port"),
        (["--bundle", "BUNDLE", "--queue", "0"], "queue is 0, expected at least 1"),
        (["--bundle", "BUNDLE", "--timeout-s", "0"], "timeout_s is 0.0"),
        (["--bundle", "BUNDLE", "--device", "cuda"], "pip install onnxruntime-gpu"),
        (["--bundle", "BUNDLE", "--device", "cdua"], "unknown device 'cdua'"),
    ],
)
def test_wrong_commands_exit_2(server: Server, bundle: Path, options: list[str], message: str) -> None:
    words = {"BUNDLE": str(bundle), "TAKEN": str(server.port)}
    done = mp2("serve", *(words.get(word, word) for word in options))
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_its_packages_the_command_says_what_to_install(bundle: Path) -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None; from mp2.cli import main; "
        f"main(['serve', '--bundle', {str(bundle)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "mp2: mp2 serve needs uvicorn: pip install 'mp2[serve]'\n")


def test_the_server_needs_no_torch(bundle: Path) -> None:
    code = (
        "import sys; from mp2.serve.app import create_app; from mp2.serve.config import ServeConfig; "
        "from mp2.serve.model import ServedBundle; "
        f"create_app(ServedBundle({str(bundle)!r}), ServeConfig(bundle='')); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

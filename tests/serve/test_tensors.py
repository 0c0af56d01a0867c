"""The Open Inference Protocol v2: the graph's own numbers, as JSON and as bytes; bad tensors are named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Server

from mp2.engine.endpoint.wire import JSON_LENGTH, message, tensors
from mp2.export.bundle_files import reading

PATH = "/v2/models/backbone/infer"
JSON = {"INT64": int, "FP32": float}


def mixed_feeds(bundle: Path) -> dict[str, np.ndarray]:
    """Three rows of two tasks, each with its own prompt."""
    tokenizer, tasks = reading.load(bundle)
    asked = [("demo_topic", {"text": "球队进球"}), ("demo_topic", {"text": "好吃"})]
    asked.append(("finding", {"context": "天气很好", "question": "什么"}))
    rows = [reading.rows(tokenizer, tasks[name], line)[0] for name, line in asked]
    return reading.feeds([tasks[name] for name, _ in asked], rows)


@pytest.fixture(scope="module")
def feeds(bundle: Path) -> dict[str, np.ndarray]:
    return mixed_feeds(bundle)


@pytest.fixture(scope="module")
def expected(bundle: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(bundle / "backbone.onnx")
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def as_json(feeds: dict[str, np.ndarray]) -> dict[str, Any]:
    inputs = []
    for name, x in feeds.items():
        datatype = "INT64" if x.dtype.kind == "i" else "FP32"
        inputs.append({"name": name, "shape": list(x.shape), "datatype": datatype, "data": x.tolist()})
    return {"inputs": inputs}


def sent(server: Server, feeds: dict[str, np.ndarray], header: dict[str, Any]) -> dict[str, np.ndarray]:
    body, length = message(header, "inputs", feeds)
    status, headers, data = server.send("POST", PATH, body, {JSON_LENGTH: str(length)})
    assert status == 200, data
    json_length = headers.get(JSON_LENGTH.lower())
    return tensors(data, None if json_length is None else int(json_length), "outputs")


def test_json_and_bytes_give_what_the_graph_gives(
    server: Server, feeds: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    status, answer = server.ask(PATH, as_json(feeds) | {"id": "seven"})
    assert (status, answer["id"], answer["model_name"]) == (200, "seven", "backbone")
    assert [output["name"] for output in answer["outputs"]] == list(expected)
    for output in answer["outputs"]:
        found = np.array(output["data"], np.float32).reshape(output["shape"])
        np.testing.assert_allclose(found, expected[output["name"]], atol=1e-6)
    some = {"outputs": [{"name": "pooled"}, {"name": "start_logits", "parameters": {"binary_data": True}}]}
    for header in (
        {"parameters": {"binary_data_output": True}},
        {"parameters": {"binary_data_output": False}},
        some,
    ):
        found = sent(server, feeds, header)
        assert list(found) == [x["name"] for x in header.get("outputs", [])] or list(found) == list(expected)
        for name, tensor in found.items():
            np.testing.assert_allclose(tensor, expected[name], atol=1e-6)


def test_one_prompt_does_for_all_rows(server: Server, bundle: Path) -> None:
    feeds = mixed_feeds(bundle)
    one = {name: x[:1] if name.startswith(("prompt", "span")) else x for name, x in feeds.items()}
    all_same = {name: np.repeat(x, 3, 0) if len(x) == 1 else x for name, x in one.items()}
    wanted = {"outputs": [{"name": "start_logits", "parameters": {"binary_data": True}}]}
    a, b = (sent(server, x, wanted)["start_logits"] for x in (one, all_same))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_metadata_and_health(server: Server, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    assert server.ask("/v2")[1]["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/backbone/ready"):
        assert server.ask(path)[0] == 200
    for graph, sides in manifest["graphs"].items():
        status, found = server.ask(f"/v2/models/{graph.removesuffix('.onnx')}/versions/1")
        assert status == 200
        for side in ("inputs", "outputs"):
            assert [x["name"] for x in found[side]] == list(sides[side])
    assert server.ask("/v2/models/backbon")[0] == 404


def test_tritonclient_talks_to_it(
    server: Server, feeds: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    http = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
    client = http.InferenceServerClient(f"{server.host}:{server.port}", concurrency=2)
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("backbone")
        declared = client.get_model_metadata("backbone")["inputs"]
        assert {x["name"] for x in declared} == set(feeds)
        for binary in (True, False):
            inputs = []
            for x in declared:
                tensor = http.InferInput(x["name"], list(feeds[x["name"]].shape), x["datatype"])
                tensor.set_data_from_numpy(feeds[x["name"]], binary_data=binary)
                inputs.append(tensor)
            wanted = [
                http.InferRequestedOutput(name, binary_data=binary) for name in ("start_logits", "hidden")
            ]
            found = client.infer("backbone", inputs, outputs=wanted, request_id="one")
            assert found.get_response()["id"] == "one"
            for name in ("start_logits", "hidden"):
                np.testing.assert_allclose(found.as_numpy(name), expected[name], atol=1e-6)
        everything = client.infer("backbone", inputs)  # without outputs: all of them
        np.testing.assert_allclose(everything.as_numpy("pooled"), expected["pooled"], atol=1e-6)
        odd = http.InferInput("input_ids", [1, 1], "INT64")
        odd.set_data_from_numpy(np.array([[10**12]]))
        with pytest.raises(Exception, match="missing"):
            client.infer("backbone", [odd])
    finally:
        client.close()


def changed(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    def change(request: dict[str, Any]) -> None:
        next(x for x in request["inputs"] if x["name"] == name).update(values)

    return change


def dropped(name: str) -> Callable[[dict[str, Any]], None]:
    def change(request: dict[str, Any]) -> None:
        request["inputs"] = [x for x in request["inputs"] if x["name"] != name]

    return change


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        (dropped("prompt_keys"), "prompt_keys", "missing"),
        (lambda r: r["inputs"].append(r["inputs"][0]), "prompt_keys", "given twice"),
        (lambda r: r["inputs"].append({"name": "x"}), "x", "unknown; the graph has input_ids"),
        (lambda r: r["inputs"].append({}), "inputs[8]", "has no name"),
        (lambda r: r.update(inputs={}), "inputs", "got an object, expected a list"),
        (lambda r: r.update(id=7), "id", "expected a string"),
        (lambda r: r.update(outputs=[{"name": "logits"}]), "logits", "unknown; the graph gives start_logits"),
        (lambda r: r.update(outputs=7), "outputs", "expected a list"),
        (lambda r: r.update(parameters=[]), "parameters", "expected an object"),
        (lambda r: r.update(parameters={"binary_data_output": "yes"}), "binary_data_output", "true or false"),
        (changed("input_ids", datatype="INT32"), "input_ids", 'datatype is "INT32", expected INT64'),
        (changed("input_ids", shape=[3, -1]), "input_ids", "expected a list of sizes"),
        (changed("input_ids", shape=[3, 2**40]), "input_ids", "expected a list of sizes"),
        (changed("input_ids", shape=[3, 3]), "input_ids", "numbers, expected 9"),
        (changed("input_ids", shape=[0, 5], data=[]), "attention_mask", "shape is"),
        (changed("input_ids", data=[[1, 2], 3]), "input_ids", "side by side"),
        (changed("input_ids", data="7"), "input_ids", "expected a list of numbers"),
        (changed("prompt_length", data=[1, 2, True]), "prompt_length", "has true, expected INT64"),
        (changed("prompt_length", data=[1, 2, 3.0]), "prompt_length", "has 3.0, expected INT64"),
        (changed("prompt_length", data=[1, 2, 2**80]), "prompt_length", "outside of 64 bits"),
        (changed("prompt_length", data=[1, 2, 17]), "prompt_length", "has 17, expected 0 to 16"),
        (changed("prompt_length", shape=[2], data=[1, 2]), "prompt_length", "shape is [2], expected"),
        (changed("segments", data=[[[0, 10**9]], [[0, 0]], [[0, 0]]]), "segments", "expected 0 to"),
        (changed("segments", data=[[[1, 0]], [[0, 0]], [[0, 0]]]), "segments", "behind its last"),
        (
            changed("segments", shape=[3, 400, 2], data=[[0, 0]] * 1200),
            "segments",
            "has 400 segments, expected",
        ),
        (changed("span_bias", data=[[1e300, 0], [0, 0], [0, 0]]), "span_bias", "not finite"),
        (changed("span_bias", parameters={"binary_data_size": 24}), "span_bias", "the body ends 24 bytes"),
        (changed("span_bias", parameters={"binary_data_size": 7}), "span_bias", "is 7, expected 24"),
    ],
)
def test_bad_tensors_are_answered_with_their_name(
    server: Server,
    feeds: dict[str, np.ndarray],
    change: Callable[[dict[str, Any]], None],
    field: str,
    text: str,
) -> None:
    order = ["prompt_keys", *(name for name in feeds if name != "prompt_keys")]
    request = as_json({name: feeds[name] for name in order})
    change(request)
    status, answer = server.ask(PATH, request)
    assert (status, answer.get("field")) == (400, field), answer
    assert text in answer["error"]


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (np.full((3, 5), 10**9), "has 1000000000, expected 0 to"),
        (np.full((3, 5), -1), "has -1, expected 0 to"),
        (np.zeros((3, 600), np.int64), "a row has 600 tokens"),
        (np.zeros((3000, 20), np.int64), "3000 rows of 20 tokens, expected at most"),
    ],
)
def test_ids_and_sizes_beyond_the_graph_are_refused(
    server: Server, feeds: dict[str, np.ndarray], ids: np.ndarray, text: str
) -> None:
    n = len(ids)
    own = {name: x[:1] for name, x in feeds.items()} | {"input_ids": ids.astype(np.int64)}
    own |= {"attention_mask": np.ones_like(own["input_ids"]), "segments": np.zeros((n, 1, 2), np.int64)}
    body, length = message({}, "inputs", own)
    status, _, data = server.send("POST", PATH, body, {JSON_LENGTH: str(length)})
    answer = json.loads(data)
    assert (status, answer["field"]) == (400, "input_ids")
    assert text in answer["error"]


@pytest.mark.parametrize("length", ["x", "-1", "99999999999", "9" * 30, "3"])
def test_a_length_of_the_json_that_is_none(server: Server, feeds: dict[str, np.ndarray], length: str) -> None:
    body, _ = message({}, "inputs", feeds)
    status, _, data = server.send("POST", PATH, body, {JSON_LENGTH: length})
    assert (status, "error" in json.loads(data)) == (400, True)


def test_what_json_cannot_say_is_refused_and_said_in_bytes(
    server: Server, feeds: dict[str, np.ndarray]
) -> None:
    large = feeds | {"span_weight": np.full_like(feeds["span_weight"], 3e38)}
    status, answer = server.ask(PATH, as_json(large) | {"outputs": [{"name": "start_logits"}]})
    assert (status, answer["field"]) == (400, "start_logits")
    assert not np.isfinite(
        sent(server, large, {"parameters": {"binary_data_output": True}})["start_logits"]
    ).all()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_no_request_is_a_failure_of_the_server(
    server: Server, feeds: dict[str, np.ndarray], data: st.DataObject
) -> None:
    """A good request with one part of it put in the place of another, or with something else there."""
    small = {name: x[:1] for name, x in feeds.items()}
    small |= {name: small[name][:, :, :, :1] for name in ("prompt_keys", "prompt_values")}
    request: Any = copy.deepcopy(as_json(small | {"prompt_length": np.array([1])}))
    place: Any = request
    for _ in range(data.draw(st.integers(1, 4))):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(ANYTHING)
            break
        place = place[key]
    body = json.dumps(request).encode()
    cut = data.draw(st.sampled_from([len(body), len(body) // 2]))
    status, _, answer = server.send("POST", PATH, body[:cut])
    assert status in (200, 400), answer
    task = data.draw(st.sampled_from(["demo_topic", "choice", "finding"]))
    line = {key: data.draw(ANYTHING) for key in ("text", "context", "question", "options")}
    kept = {key: x for key, x in line.items() if data.draw(st.booleans())}
    status, _, answer = server.send("POST", f"/v1/tasks/{task}", json.dumps(kept).encode())
    assert status in (200, 400), answer
    assert server.process.poll() is None
    assert b"Traceback" not in server.log.read_bytes()

"""The server's routes: plain questions to tasks, tensors to graphs, health and numbers.

FastAPI and uvicorn rather than LitServe (which starts processes of its own and has no v2 protocol) or
MLServer (whose batches never mix models): what a request waits for here is one queue in one process.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from mp2 import __version__
from mp2.engine.endpoint.wire import JSON_LENGTH, NAMES
from mp2.errors import UnknownNameError
from mp2.export.bundle_files import reading
from mp2.serve.batcher import Batcher
from mp2.serve.config import ServeConfig
from mp2.serve.counting import Counted, Metrics
from mp2.serve.errors import BadRequestError, RequestError
from mp2.serve.lines import checked
from mp2.serve.model import ServedBundle
from mp2.serve.replies import json_reply, refusal
from mp2.serve.request_body import read_body, read_json
from mp2.serve.tensors import GraphLimits, read_infer, write_infer

_SHORT = 4096  # bytes of a body that is tokenized at once; a longer one would keep others waiting


def create_app(served: ServedBundle, config: ServeConfig) -> FastAPI:
    """Return the server's application; it computes from its start to its end."""
    metrics = Metrics()
    batcher = Batcher(served, config, metrics)
    limits = GraphLimits(
        vocab_size=served.vocab_size,
        positions=served.positions,
        max_tokens=config.max_batch * served.positions,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title="mp2", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)

    app.add_middleware(Counted, metrics=metrics, most_open=2 * config.queue)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return refusal(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return json_reply(
            {"error": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code
        )

    # -- tasks ---------------------------------------------------------------------------------------------

    @app.get("/v1/tasks")
    async def tasks() -> Response:
        return json_reply({"tasks": [_about(task) for task in served.tasks.values()]})

    @app.get("/v1/tasks/{name}")
    async def task(name: str) -> Response:
        return json_reply(_about(_named("task", name, served.tasks)))

    @app.post("/v1/tasks/{name}")
    async def answers(name: str, request: Request) -> Response:
        task = _named("task", name, served.tasks)
        body = await read_body(request, config.max_body_bytes, config.timeout_s)
        given = read_json(body)
        many = isinstance(given, list)
        if many and len(given) > config.queue:
            raise RequestError(413, f"there are {len(given)} lines, expected at most {config.queue}")
        lines = [
            checked(task, line, f"[{number}]." if many else "")
            for number, line in enumerate(given if many else [given])
        ]

        def tokenize() -> list[list[reading.Row]]:
            return [_rows(served, task, line) for line in lines]

        rows = tokenize() if len(body) <= _SHORT else await run_in_threadpool(tokenize)
        outputs = iter(await batcher.rows(task, [row for own in rows for row in own]))
        found = [
            _finite(reading.answer(task, line, own, [next(outputs) for _ in own]))
            for line, own in zip(lines, rows, strict=True)
        ]
        metrics.lines.labels(name).inc(len(found))
        return json_reply(found if many else found[0])

    # -- the Open Inference Protocol v2 --------------------------------------------------------------------

    @app.get("/v2")
    async def server() -> Response:
        return json_reply({"name": "mp2", "version": __version__, "extensions": ["binary_tensor_data"]})

    @app.get("/v2/health/live")
    @app.get("/v2/health/ready")
    async def health() -> Response:
        return json_reply({})

    @app.get("/v2/models/{model}/ready")
    @app.get("/v2/models/{model}/versions/1/ready")
    async def model_ready(model: str) -> Response:
        _named("model", model, served.graphs)
        return json_reply({})

    @app.get("/v2/models/{model}")
    @app.get("/v2/models/{model}/versions/1")
    async def metadata(model: str) -> Response:
        interface = _named("model", model, served.graphs)
        sides = {
            side: [
                {
                    "name": name,
                    "datatype": NAMES[x["dtype"]],
                    "shape": [-1 if isinstance(n, str) else n for n in x["shape"]],
                }
                for name, x in interface[side].items()
            ]
            for side in ("inputs", "outputs")
        }
        parameters = {
            "backbone": served.backbone,
            "backbone_sha256": served.backbone_sha256,
            "precision": served.precision,
            "max_tokens": limits.max_tokens,
            "max_body_bytes": config.max_body_bytes,
        }
        return json_reply(
            {
                "name": model,
                "versions": ["1"],
                "platform": "onnxruntime_onnx",
                **sides,
                "parameters": parameters,
            }
        )

    @app.post("/v2/models/{model}/infer")
    @app.post("/v2/models/{model}/versions/1/infer")
    async def infer(model: str, request: Request) -> Response:
        interface = _named("model", model, served.graphs)
        body = await read_body(request, config.max_body_bytes, config.timeout_s)
        asked = await run_in_threadpool(read_infer, body, request.headers.get(JSON_LENGTH), interface, limits)
        found = await batcher.whole(model, asked.feeds, asked.outputs)
        data, json_length = await run_in_threadpool(write_infer, asked, model, found)
        if json_length is None:
            return Response(data, media_type="application/json")
        headers = {JSON_LENGTH: str(json_length)}
        return Response(data, media_type="application/octet-stream", headers=headers)

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _rows(served: ServedBundle, task: reading.Task, line: dict[str, Any]) -> list[reading.Row]:
    try:
        return reading.rows(served.tokenizer, task, line)
    except ValueError as error:
        raise BadRequestError(str(error), "options") from None


def _finite(answer: dict[str, Any]) -> dict[str, Any]:
    if not math.isfinite(answer["probability"]):
        raise RequestError(422, "its scores are no numbers; export the runs with --precision fp32")
    return answer


def _about(task: reading.Task) -> dict[str, Any]:
    fields = [*task["fields"], *(["options"] if task["type"] == "multiple_choice" else [])]
    labels = [option["label"] for option in task["options"]]
    return {"name": task["name"], "type": task["type"], "fields": fields} | (
        {"labels": labels} if labels else {}
    )


def _named(kind: str, name: str, known: Any) -> Any:
    if name not in known:
        raise RequestError(404, str(UnknownNameError(kind, name[:60], known)))
    return known[name]

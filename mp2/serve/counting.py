"""What a server counts, for Prometheus, and what every request passes to be counted, timed or refused."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mp2.serve.errors import OverloadError
from mp2.serve.replies import refusal

_GONE = 499  # the client went before its answer
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("mp2_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.request_s = Histogram(
            "mp2_request_seconds",
            "From a request's head to its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.lines = Counter("mp2_lines", "Lines answered.", ["task"], registry=registry)
        self.waiting = Gauge("mp2_waiting_rows", "Sequences that wait for a forward.", registry=registry)
        self.batch_rows = Histogram(
            "mp2_batch_rows", "Sequences of a forward.", buckets=_ROWS, registry=registry
        )
        self.forward_s = Histogram(
            "mp2_forward_seconds", "Time of a forward.", buckets=_SECONDS, registry=registry
        )

    def text(self) -> bytes:
        """Return them in Prometheus' text format."""
        return generate_latest(self._registry)


class Counted:
    """An application whose requests are counted; more than ``most_open`` POSTs at a time get 429.

    Bodies take memory before anything of them waits in the queue.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, most_open: int) -> None:
        self._app, self._metrics, self._most_open = app, metrics, most_open
        self._n_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, is_post = time.perf_counter(), _GONE, scope["method"] == "POST"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._n_open += is_post
        try:
            if is_post and self._n_open > self._most_open:
                reply = refusal(OverloadError(self._n_open - 1, self._most_open))
                await reply(scope, receive, watched)
            else:
                await self._app(scope, receive, watched)
        except ClientDisconnect:
            pass
        finally:
            self._n_open -= is_post
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.request_s.labels(route).observe(time.perf_counter() - started)

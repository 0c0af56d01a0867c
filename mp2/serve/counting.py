"""What every request passes: it is counted and timed, and refused where too many are open."""

from __future__ import annotations

import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mp2.serve.errors import OverloadError
from mp2.serve.metrics import Metrics
from mp2.serve.replies import refusal

_GONE = 499  # the client went before its answer


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

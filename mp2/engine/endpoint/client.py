"""Requests to one or several servers of the same graph: kept connections, retries, an end to patience."""

from __future__ import annotations

import http.client
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from mp2.engine.endpoint.wire import JSON_LENGTH, message, tensors
from mp2.errors import FormatError, MismatchError, Mp2Error, UsageError
from mp2.json_files import Fields, check, list_of, parse_json, text, whole

CONNECTIONS = 2  # to a server: one request is computed, the next is on its way
_LONGEST_WAIT_S = 5.0
_LONGEST_END_S = 1.0
_ANSWER_S = 300.0  # that a server may compute
_LATER = (408, 429, 500, 502, 503, 504)  # may be answered when asked again


_METADATA = Fields(
    {"inputs": list_of(Fields({"name": text, "shape": list_of(whole(-1))}))},
    {
        "parameters": Fields(
            {}, {"backbone": text, "backbone_sha256": text, "precision": text, "max_tokens": whole(1)}
        )
    },
)


class EndpointError(Mp2Error):
    """No server answers, or one refuses what it was sent."""


@dataclass
class _Request:
    path: str
    feeds: Mapping[str, np.ndarray]
    outputs: list[str]
    answer: Future[dict[str, np.ndarray]] = field(default_factory=Future)
    waited_since: float | None = None  # when it first failed


class Endpoints:
    """Servers that share one queue of requests: whichever is free takes the next.

    A request that fails is asked again, of any server, after a pause that grows; when ``patience_s`` have
    passed since it first failed, its result is an EndpointError. The threads that send begin with the first
    request and end with this object.
    """

    def __init__(self, urls: list[str], patience_s: float, note: Callable[[str], None]) -> None:
        """``note`` hears once of every server that stops answering, and of its return."""
        self.urls, self._patience_s = urls, patience_s
        self._servers = [(url, _place(url)) for url in urls]
        self._queue = _Queue(patience_s, note)
        self._started = False
        weakref.finalize(self, self._queue.end)

    def metadata(self, model: str) -> dict[str, Any]:
        """Return what the servers say of ``model``; all must say the same.

        Raises EndpointError (none of it answers in time), MismatchError (they differ), UsageError (no such).
        """
        found = [self._ask(url, place, f"/v2/models/{model}") for url, place in self._servers]
        for url, other in zip(self.urls, found, strict=True):
            if any(other.get(key) != found[0].get(key) for key in ("inputs", "outputs", "parameters")):
                raise MismatchError(
                    f"{url} serves another graph than {self.urls[0]}: name servers of one bundle"
                )
        try:
            return dict(check(found[0], _METADATA, f"{self.urls[0]}/v2/models/{model}"))
        except FormatError as error:
            raise UsageError(str(error)) from error

    def infer(
        self, model: str, feeds: Mapping[str, np.ndarray], outputs: list[str]
    ) -> Future[dict[str, np.ndarray]]:
        """Begin to ask for ``outputs`` of ``model``."""
        if not self._started:
            self._started = True
            for url, place in self._servers:
                for _ in range(CONNECTIONS):
                    self._queue.start(url, place)
        request = _Request(f"/v2/models/{model}/infer", feeds, outputs)
        self._queue.put(request)
        return request.answer

    def _ask(self, url: str, place: tuple[str, str, int], path: str) -> dict[str, Any]:
        """Return the JSON object at ``path`` of one server."""
        until, attempt = time.monotonic() + self._patience_s, 0
        with closing(_connection(place)) as connection:
            while True:
                try:
                    status, _, data = _exchange(connection, "GET", path, None, {})
                    if status not in _LATER:
                        break
                    error: Exception = OSError(f"HTTP status {status}: {_said(data)}")
                except (OSError, http.client.HTTPException) as problem:
                    connection.close()
                    error = problem
                if time.monotonic() >= until:
                    raise EndpointError(_silent(url, error, self._patience_s)) from error
                time.sleep(_pause(attempt))
                attempt += 1
        try:
            found = parse_json(data.decode("utf-8")) if status == 200 else None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UsageError(
                f"{url}{path} is not there (status {status}: {_said(data)}); serve it with 'mp2 serve'"
            )
        return found


class _Queue:
    """What waits to be sent, and what a thread for each connection does with it."""

    def __init__(self, patience_s: float, note: Callable[[str], None]) -> None:
        self._patience_s, self._note = patience_s, note
        self._waiting: deque[_Request] = deque()
        self._ready = threading.Condition()
        self._down: set[str] = set()
        self._ended = False
        self._threads: list[threading.Thread] = []

    def start(self, url: str, place: tuple[str, str, int]) -> None:
        """Begin to send to a server, over one connection."""
        self._threads.append(threading.Thread(target=self.serve, args=(url, place), daemon=True))
        self._threads[-1].start()

    def put(self, request: _Request) -> None:
        with self._ready:
            self._waiting.append(request)
            self._ready.notify()

    def end(self) -> None:
        """Let the threads go: one that is still there when the interpreter ends can abort the process.

        One that waits for a server's answer is not waited for.
        """
        with self._ready:
            self._ended = True
            self._ready.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_LONGEST_END_S)

    def serve(self, url: str, place: tuple[str, str, int]) -> None:
        """Send what waits to one server, over one connection."""
        connection, failures = _connection(place), 0
        while True:
            with self._ready:
                while not self._waiting and not self._ended:
                    self._ready.wait()
                if self._ended:
                    connection.close()
                    return
                request = self._waiting.popleft()
            try:
                wanted = [{"name": name, "parameters": {"binary_data": True}} for name in request.outputs]
                body, json_length = message({"outputs": wanted}, "inputs", request.feeds)
                sent = {JSON_LENGTH: str(json_length), "Content-Type": "application/octet-stream"}
                status, headers, data = _exchange(connection, "POST", request.path, body, sent)
                if status in _LATER:
                    raise OSError(f"HTTP status {status}: {_said(data)}")
                if status != 200:
                    request.answer.set_exception(
                        EndpointError(f"{url} refuses a request (status {status}): {_said(data)}")
                    )
                    continue
                length = headers.get(JSON_LENGTH.lower())
                found = tensors(data, None if length is None else int(length), "outputs")
                if missing := [name for name in request.outputs if name not in found]:
                    raise FormatError(f"the answer has no {missing[0]}")
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                self._again(request, url, error)
                failures += 1
                time.sleep(_pause(failures))
                continue
            except (ValueError, FormatError) as error:
                request.answer.set_exception(EndpointError(f"{url} sent an answer that is none: {error}"))
                continue
            except Exception as error:  # memory that ran out, say: a thread that ended would not be heard
                connection.close()
                request.answer.set_exception(error)
                continue
            failures = 0
            with self._ready:
                if url in self._down:
                    self._down.discard(url)
                    self._note(f"{url} answers again")
            request.answer.set_result(found)

    def _again(self, request: _Request, url: str, error: Exception) -> None:
        """Put a request that failed back in front, or end it where patience has run out."""
        now = time.monotonic()
        if request.waited_since is None:
            request.waited_since = now
        if now - request.waited_since >= self._patience_s:
            request.answer.set_exception(EndpointError(_silent(url, error, self._patience_s)))
            return
        with self._ready:
            if url not in self._down and not isinstance(error, http.client.RemoteDisconnected):
                self._down.add(url)
                self._note(f"{url} does not answer ({error}); asking again for {self._patience_s:g} s")
            self._waiting.appendleft(request)
            self._ready.notify()


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
) -> tuple[int, dict[str, str], bytes]:
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()


def _connection(place: tuple[str, str, int]) -> http.client.HTTPConnection:
    scheme, host, port = place
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    return kind(host, port, timeout=_ANSWER_S)


def _place(url: str) -> tuple[str, str, int]:
    """Return (scheme, host, port) of a server's address; UsageError for what is none."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise UsageError(f"--endpoint {url}: {error}; expected http://HOST:PORT") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise UsageError(f"--endpoint {url}: expected http://HOST:PORT of 'mp2 serve', without a path")
    return parts.scheme, parts.hostname, port


def _pause(attempt: int) -> float:
    """Return seconds before the next attempt: doubled each time, never the same for two clients."""
    return min(_LONGEST_WAIT_S, 0.1 * 2.0 ** min(attempt, 10)) * random.uniform(0.5, 1.0)


def _silent(url: str, error: Exception, patience_s: float) -> str:
    return (
        f"{url} did not answer for {patience_s:g} s ({error}); start it again, "
        "then go on with the run or raise --endpoint-patience-s"
    )


def _said(data: bytes) -> str:
    """Return a server's own words, or what there is of them."""
    try:
        said = str(parse_json(data.decode("utf-8"))["error"])
    except (ValueError, KeyError, TypeError):
        said = data.decode("utf-8", "replace")
    return " ".join(said.split())[:300] or "nothing"

"""A running server: from a bundle and a port to the last answer."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mp2.errors import UsageError
from mp2.serve.app import create_app
from mp2.serve.config import ServeConfig
from mp2.serve.model import ServedBundle

_SWITCH_S = 0.0005  # that a thread runs Python while another waits to; 0.005 would be some forwards
_IDLE_S = 75  # that a connection without a request is kept
_LAST_S = 5  # beyond a request's own time, for the last answers of a server that stops


def serve(config: ServeConfig, say: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then those that have begun; ``say`` hears where it listens.

    Raises FormatError and others of `ServedBundle`, UsageError for an address that cannot be had.
    """
    sys.setswitchinterval(_SWITCH_S)
    served = ServedBundle(config.bundle, device=config.device, threads=config.threads)
    listener = _listener(config)
    host, port = listener.getsockname()[:2]
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(served, config),
            http=_protocol(config.timeout_s),
            ws="none",
            lifespan="on",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=int(config.timeout_s) + _LAST_S,
        )
    )
    # uvicorn stops at the first of these and then raises it once more: it has been obeyed
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        place = f"[{host}]" if ":" in host else host
        what = ", ".join(served.tasks) or f"backbone '{served.backbone}'"
        say(f"serving {what} on http://{place}:{port}; Ctrl-C stops")
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listener.close()


def _listener(config: ServeConfig) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        # asyncio sets TCP_NODELAY only where the protocol is named; without it an answer, which is several
        # writes, waits 40 ms until its client has acknowledged the first
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {config.host}: {error}; give an address of this machine") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {config.host}, port {config.port}: {error.strerror}; give another --port"
        ) from None
    return listener


def _protocol(timeout_s: float) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol, which also closes connections whose request's head does not come.

    Of the first request and of later ones: uvicorn's own limit ends with the first byte of a head. And those
    whose client does not read its answer, which uvicorn would keep for ever.
    """

    class Protocol(H11Protocol):
        _waits: asyncio.TimerHandle | None = None  # for the rest of a head

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._waits = self.loop.call_later(timeout_s, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            idle = self.cycle is None or self.cycle.response_complete
            if not idle and self._waits is not None:
                self._waits.cancel()
                self._waits = None
            elif idle and self._waits is None:
                self._waits = self.loop.call_later(timeout_s, self.transport.abort)

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()  # closes it once all is sent
            self.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._waits is not None:
                self._waits.cancel()

    return Protocol

"""A running server: from a bundle and a port to the last answer."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mp2.errors import UsageError
from mp2.serve.app import create_app
from mp2.serve.config import ServeConfig
from mp2.serve.model import ServedBundle

_IDLE_S = 75  # that a connection without a request is kept
_LAST_S = 5  # beyond a request's own time, for the last answers of a server that stops


def serve(config: ServeConfig, say: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then those that have begun; ``say`` hears where it listens.

    Raises FormatError and others of `ServedBundle`, UsageError for an address that cannot be had.
    """
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
        listener = socket.socket(family, socket.SOCK_STREAM)
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
    """Return uvicorn's HTTP protocol, which also closes connections whose request's head does not come."""

    class Protocol(H11Protocol):
        def connection_made(self, transport: object) -> None:  # type: ignore[override]
            super().connection_made(transport)  # type: ignore[arg-type]
            self.loop.call_later(timeout_s, self._without_a_head)

        def _without_a_head(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return Protocol

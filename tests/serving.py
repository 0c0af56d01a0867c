"""Real servers for tests: ``mp2 serve`` as a process, and requests to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """A running ``mp2 serve``."""

    process: subprocess.Popen[bytes]
    host: str
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers in lower case, body) of one request."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def ask(self, path: str, value: object = None) -> tuple[int, Any]:
        """(status, JSON) of a GET or, with a value, a POST."""
        body = None if value is None else json.dumps(value, ensure_ascii=False).encode()
        status, _, data = self.send("GET" if body is None else "POST", path, body)
        return status, json.loads(data)

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)


def start_server(
    bundle: Path, log: Path, *options: str, idle_s: int | None = None, most_files: int | None = None
) -> Server:
    """Start a server on a free port of the loopback, and wait until it answers.

    ``idle_s`` is how long it keeps a connection without a request, ``most_files`` how many files it may open.
    """
    code = "from mp2.cli import main; "
    if idle_s is not None:
        code += f"import mp2.serve.server as server; server._IDLE_S = {idle_s}; "
    if most_files is not None:
        code += f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({most_files},) * 2); "
    command = [sys.executable, "-c", f"{code}main()"]
    command += ["serve", "--bundle", str(bundle), "--port", "0", "--threads", "1"]
    with log.open("wb") as file:
        process = subprocess.Popen([*command, *options], stderr=file, stdout=file, env=os.environ.copy())
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"on http://([\d.]+):(\d+);", log.read_text("utf-8")):
            server = Server(process, found[1], int(found[2]), log)
            try:
                if server.send("GET", "/v2/health/ready")[0] == 200:
                    return server
            except OSError:
                pass
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"no server: {log.read_text('utf-8')}")

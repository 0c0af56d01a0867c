"""Limits and the end of a real server: bodies, slow clients, overload, SIGTERM, what it counts."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server, start_server

from mp2.engine.endpoint.wire import JSON_LENGTH, message
from mp2.errors import UsageError
from mp2.serve.config import ServeConfig
from mp2.serve.server import _listener

LINE = json.dumps({"text": "球队进球"}).encode()
PATH = "/v1/tasks/demo_topic"


def test_it_listens_on_the_loopback_unless_told_otherwise(server: Server) -> None:
    assert server.host == "127.0.0.1"


def test_a_body_that_is_too_large_is_refused_before_it_is_read(start: Callable[..., Server]) -> None:
    server = start("--max-body-mib", "0.01")
    status, _, data = server.send("POST", PATH, b"x" * 20_000)
    assert (status, "larger than 10,485 bytes" in json.loads(data)["error"]) == (413, True)
    with socket.create_connection((server.host, server.port), 30) as connection:  # it says so, and sends none
        connection.sendall(
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n".encode()
        )
        assert b" 413 " in connection.recv(4096)
    chunked = http.client.HTTPConnection(server.host, server.port, timeout=30)
    chunked.request("POST", PATH, iter([b"x" * 8_000] * 3), encode_chunked=True)
    assert chunked.getresponse().status == 413
    chunked.close()
    assert server.ask(PATH, {"text": "球队进球"})[0] == 200


def test_a_compressed_body_is_refused(server: Server) -> None:
    for encoding in ("gzip", "deflate", "br, gzip"):
        status, _, data = server.send("POST", PATH, gzip.compress(LINE), {"Content-Encoding": encoding})
        assert (status, json.loads(data)["error"]) == (
            415,
            f'Content-Encoding is "{encoding}", expected none: send the body as it is',
        )
    assert server.send("POST", PATH, LINE, {"Content-Encoding": "identity"})[0] == 200


def test_a_list_of_more_lines_than_may_wait_is_refused(start: Callable[..., Server]) -> None:
    server = start("--queue", "3")
    status, answer = server.ask(PATH, [{"text": "x"}] * 4)
    assert (status, answer["error"]) == (413, "there are 4 lines, expected at most 3")


def test_slow_clients_are_let_go(start: Callable[..., Server]) -> None:
    server = start("--timeout-s", "1")
    with socket.create_connection((server.host, server.port), 30) as half_body:
        half_body.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in half_body.recv(4096)
    with socket.create_connection((server.host, server.port), 30) as half_head:
        half_head.sendall(b"POST /v1/ta")
        started = time.monotonic()
        assert half_head.recv(4096) == b""
        assert time.monotonic() - started < 20
    with socket.create_connection((server.host, server.port), 30) as gone:  # leaves in the middle of its body
        gone.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
    with socket.create_connection((server.host, server.port), 30) as no_http:
        no_http.sendall(b"\x00\x01\x02 nothing like HTTP\r\n\r\n")
        assert b" 400 " in no_http.recv(4096)
    assert server.ask(PATH, {"text": "球队进球"})[0] == 200
    assert b"Traceback" not in server.log.read_bytes()
    assert re.search(r'status="408"} 1\.0', server.send("GET", "/metrics")[2].decode())


def trickle(connection: socket.socket, data: bytes) -> None:
    for letter in data:  # a byte now and then
        connection.sendall(bytes([letter]))
        time.sleep(0.2)


def read_on(connection: socket.socket) -> bytes:
    parts = []
    try:
        while part := connection.recv(1 << 20):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def test_a_later_head_may_be_no_slower_than_the_first(start: Callable[..., Server]) -> None:
    server = start("--timeout-s", "1")
    with socket.create_connection((server.host, server.port), 30) as connection:
        for _ in range(2):
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"{}"):
                answer += connection.recv(4096)
            time.sleep(2)  # idle for longer than a head may take
        started = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            trickle(connection, b"GET /v2/health/live HTTP/1.1\r\nHost: " + 80 * b"x")
        assert time.monotonic() - started < 15


def test_an_answer_that_nobody_reads_is_not_kept(bundle: Path, tmp_path: Path) -> None:
    server = start_server(bundle, tmp_path / "log", idle_s=2)
    graph = server.ask("/v2/models/backbone")[1]
    own = {x["name"]: [1 if size < 0 else size for size in x["shape"]] for x in graph["inputs"]}
    n, t = 16, 200
    own["input_ids"] = own["attention_mask"] = [n, t]
    own["segments"] = [n, 1, 2]
    types = {x["name"]: np.int64 if x["datatype"] == "INT64" else np.float32 for x in graph["inputs"]}
    body, length = message({}, "inputs", {name: np.zeros(shape, types[name]) for name, shape in own.items()})
    head = f"POST /v2/models/backbone/infer HTTP/1.1\r\nHost: x\r\n{JSON_LENGTH}: {length}\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect((server.host, server.port))
    try:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(6)  # some 10 MB of numbers as JSON lie at the server
        got = read_on(connection)
        length = int(re.search(rb"content-length: (\d+)", got)[1])  # type: ignore[index]
        assert length > len(got)  # the rest was given up
        assert server.ask(PATH, {"text": "球队进球"})[0] == 200
    finally:
        connection.close()
        server.kill()


def test_more_connections_than_files_are_outlived(bundle: Path, tmp_path: Path) -> None:
    server = start_server(bundle, tmp_path / "log", "--timeout-s", "1", most_files=80)
    open_ones = []
    try:
        for _ in range(120):
            open_ones.append(socket.create_connection((server.host, server.port), 30))
        until = time.monotonic() + 60
        while True:  # those without a head are let go
            try:
                assert server.ask(PATH, {"text": "球队进球"})[0] == 200
                break
            except OSError:
                assert time.monotonic() < until
    finally:
        for one in open_ones:
            one.close()
        server.kill()


def test_nothing_that_was_begun_is_lost_at_sigterm(start: Callable[..., Server]) -> None:
    server = start("--max-wait-ms", "1500", "--max-batch", "64")
    found: list[Any] = []

    def ask(k: int) -> None:
        found.append(server.ask(PATH, {"text": f"球队进球{k}"}))

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(12)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 30
    while "mp2_waiting_rows 12.0" not in server.send("GET", "/metrics")[2].decode():  # all are in the queue
        assert time.monotonic() < until
    assert server.stop() == 0
    for thread in threads:
        thread.join(30)
    assert [status for status, _ in found] == [200] * 12
    assert all("label" in answer for _, answer in found)
    with pytest.raises(ConnectionRefusedError):
        server.ask("/v2/health/live")
    assert b"Traceback" not in server.log.read_bytes()


def test_overload_is_429_and_says_when_to_come_again(start: Callable[..., Server]) -> None:
    server = start("--queue", "2", "--max-wait-ms", "1500")
    found: list[tuple[int, dict[str, str]]] = []

    def ask() -> None:
        status, headers, _ = server.send("POST", PATH, LINE)
        found.append((status, headers))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    assert server.ask("/v2/health/ready")[0] == 200
    for thread in threads:
        thread.join(60)
    assert sorted({status for status, _ in found}) == [200, 429]
    assert all(headers["retry-after"] == "1" for status, headers in found if status == 429)
    assert sum(status == 200 for status, _ in found) >= 2


def test_what_is_late_is_504(start: Callable[..., Server]) -> None:
    server = start("--timeout-s", "0.2", "--max-wait-ms", "5000")
    status, answer = server.ask(PATH, {"text": "球队进球"})
    assert (status, "no answer within 0.2 s" in answer["error"]) == (504, True)


def test_it_counts_what_it_does(start: Callable[..., Server]) -> None:
    server = start()
    for _ in range(3):
        server.ask(PATH, [{"text": "球队进球"}, {"text": "好吃"}])
    server.ask(PATH, {"txt": 1})
    text = server.send("GET", "/metrics")[2].decode()
    assert 'mp2_requests_total{route="/v1/tasks/{name}",status="200"} 3.0' in text
    assert 'mp2_requests_total{route="/v1/tasks/{name}",status="400"} 1.0' in text
    assert 'mp2_lines_total{task="demo_topic"} 6.0' in text
    assert "mp2_batch_rows_sum 6.0" in text
    assert re.search(r'mp2_request_seconds_count\{route="/v1/tasks/\{name\}"\} 4\.0', text)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_parts_of_an_answer_are_sent_at_once(tmp_path: Path, host: str) -> None:
    """Otherwise the second of two writes waits 40 ms for the first one's acknowledgement (Nagle, 1984)."""

    async def accepted() -> int:
        seen: asyncio.Queue[int] = asyncio.Queue()

        async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            await seen.put(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with _listener(ServeConfig(bundle=str(tmp_path), host=host, port=0)) as listener:
            async with await asyncio.start_server(note, sock=listener):
                with socket.create_connection(listener.getsockname()[:2]):
                    return await seen.get()

    try:
        assert asyncio.run(accepted()) != 0
    except UsageError:
        pytest.skip(f"this machine has no {host}")

"""Clients of `benchmarks.serve.load`, in a process of their own that loads nothing: a closed loop each.

Standard input: ports by task, texts, number of clients, seconds, seed; standard output: seconds of each
answer, and what failed; all JSON.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import threading
import time

from benchmarks.command import one_line_errors


@one_line_errors()
def main() -> None:
    """Ask until the time is over."""
    asked = json.load(sys.stdin)
    ports, names = asked["ports"], sorted(asked["ports"])
    bodies = [json.dumps({"text": text}).encode() for text in asked["texts"]]
    times: list[list[float]] = [[] for _ in range(asked["clients"])]
    begin = threading.Barrier(asked["clients"])
    failed: list[str] = []

    def client(number: int) -> None:
        rng = random.Random(1000 * asked["seed"] + number)
        kept: dict[int, http.client.HTTPConnection] = {}
        begin.wait()
        until = time.perf_counter() + asked["seconds"]
        while (started := time.perf_counter()) < until:
            name = rng.choice(names)
            port = ports[name]
            connection = kept.setdefault(port, http.client.HTTPConnection("127.0.0.1", port, timeout=60))
            connection.request("POST", f"/v1/tasks/{name}", rng.choice(bodies))
            reply = connection.getresponse()
            body = reply.read()
            if reply.status != 200:
                failed.append(f"{reply.status} {body[:100]!r}")
            times[number].append(time.perf_counter() - started)
        for connection in kept.values():
            connection.close()

    threads = [threading.Thread(target=client, args=(k,)) for k in range(asked["clients"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"seconds": [x for own in times for x in own], "failed": failed}))


if __name__ == "__main__":
    main()

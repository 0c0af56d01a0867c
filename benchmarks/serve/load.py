"""Requests a second of ``mp2 serve``, and how long an answer takes, with 1 to 64 tasks on one backbone.

Three systems serve the same tasks: one server whose batches mix tasks; the same with batches of one task each
(``--no-mix-tasks``); a process for each task (up to ``--most-processes``: each has the weights once more).
Clients in a process of their own ask in a closed loop, each the next text of a task drawn at random as soon
as it has an answer. Systems alternate within a round; tables have medians over rounds and their range. Beside
the clock's figures stands the processor time that the servers took for a request, which other work on the
machine hardly changes. The tasks are one short run of ``demo_sentiment`` over the embedded backbone, with
other prompts for each task.

    python -m benchmarks.serve.load [--tasks 1 4 16 64] [--clients 16] [--rounds 5] [--seconds 4]

About nine minutes on two quiet cores, three of them starts; 64 processes take 8 GB of memory. Result:
``serve_load.json``.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from benchmarks.speed.rounds import check_rounds, ranged, spread
from mp2.engine.folder import MANIFEST, file_sha256
from mp2.errors import Mp2Error
from mp2.export import write_bundle
from mp2.optimizers.config import RouterConfig
from mp2.runs import BbtConfig, start_run
from mp2.tasks import load_card, load_examples

TASK = "demo_sentiment"
SYSTEMS = ("mixed", "a task a batch", "a process a task")
_START_S = 180.0


def make_bundle(folder: Path) -> Path:
    """Tune ``TASK`` briefly, and write its bundle."""
    config = BbtConfig(
        task=TASK, iters=40, router=RouterConfig(iterations=20), test=False, baselines=False, threads=1
    )
    run = start_run(config, folder / "runs")["run_dir"]
    write_bundle([Path(run)], folder / "one")
    return folder / "one"


def with_tasks(one: Path, out: Path, names: Sequence[str]) -> Path:
    """Write a bundle like ``one`` whose task is there under each of ``names``, each with its own prompt."""
    shutil.copytree(one, out, copy_function=os.link)
    manifest = json.loads((one / MANIFEST).read_text("utf-8"))
    (entry,) = manifest["tasks"].values()
    tensors = load_file(one / entry["tensors"])
    card = json.loads((one / entry["card"]).read_text("utf-8"))
    manifest["tasks"] = {}
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        own = {key: x + 0.01 * rng.standard_normal(x.shape).astype(x.dtype) for key, x in tensors.items()}
        files = {"tensors": f"tasks/{name}.safetensors", "card": f"tasks/{name}.json"}
        save_file(own, out / files["tensors"])
        (out / files["card"]).write_text(json.dumps({**card, "name": name}), "utf-8")
        manifest["tasks"][name] = {**entry, **files}
        manifest["files"] |= {file: file_sha256(out / file) for file in files.values()}
    (out / MANIFEST).unlink()  # a link to the other bundle's
    (out / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return out


@contextmanager
def servers(commands: Sequence[Sequence[str]], logs: Path) -> Iterator[dict[int, int]]:
    """Start servers, and give port -> process of each once all answer."""
    processes, files = [], []
    try:
        for number, options in enumerate(commands):
            files.append(logs / f"{number}.log")
            command = [sys.executable, "-m", "mp2", "serve", "--port", "0", "--threads", "1", *options]
            with files[-1].open("wb") as log:
                processes.append(subprocess.Popen(command, stderr=log, stdout=log))
        yield {_port(p, file): p.pid for p, file in zip(processes, files, strict=True)}
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(60)


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"on http://[\d.]+:(\d+);", log.read_text("utf-8")):
            return int(found[1])
        time.sleep(0.05)
    raise Mp2Error(f"a server did not start: {log.read_text('utf-8')[-300:]}")


def measured(
    ports: dict[str, int], processes: dict[int, int], args: argparse.Namespace, seed: int
) -> dict[str, float]:
    """Return requests a second, p50 and p99 in ms, servers' ms a request, and sequences a forward."""
    used = {processes[port] for port in ports.values()}
    before, cpu_before = _forwards(set(ports.values())), _cpu_s(used)
    texts = [example.fields["text"] for example in load_examples(load_card(TASK), "test")][:200]
    asked = {"ports": ports, "texts": texts, "clients": args.clients, "seconds": args.seconds, "seed": seed}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve.clients"],
        cwd=Path(__file__).parents[2],  # the script's own folder would hide the package "benchmarks"
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Mp2Error(f"the clients failed: {done.stderr[-300:]}")
    found = json.loads(done.stdout)
    if found["failed"]:
        raise Mp2Error(f"{len(found['failed'])} requests failed, first {found['failed'][0]}")
    after, ms = _forwards(set(ports.values())), 1000 * np.array(found["seconds"])
    n_forwards, cpu_s = after[0] - before[0], _cpu_s(used) - cpu_before
    return {
        "requests_per_s": len(ms) / args.seconds,
        "p50_ms": float(np.percentile(ms, 50)),
        "p99_ms": float(np.percentile(ms, 99)),
        "cpu_ms": 1000 * cpu_s / len(ms),
        "rows_per_forward": (after[1] - before[1]) / max(1.0, n_forwards),
    }


def _cpu_s(processes: set[int]) -> float:
    """Return the processor time that processes have taken, in s (Linux)."""
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def _forwards(ports: set[int]) -> tuple[float, float]:
    """Return how many forwards the servers have run, and of how many sequences."""
    total = [0.0, 0.0]
    for port in ports:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        for k, name in enumerate(("mp2_batch_rows_count", "mp2_batch_rows_sum")):
            found = re.search(rf"^{name} (\S+)$", text, re.M)
            total[k] += float(found[1]) if found else 0.0
    return total[0], total[1]


def compared(one: Path, folder: Path, n_tasks: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return a row of the result: all systems with ``n_tasks`` tasks."""
    names = [f"task{k:02d}" for k in range(n_tasks)]
    every = with_tasks(one, folder / f"all{n_tasks}", names)
    commands = [["--bundle", str(every)], ["--bundle", str(every), "--no-mix-tasks"]]
    apart = n_tasks <= args.most_processes
    for name in names if apart else []:
        commands.append(["--bundle", str(with_tasks(one, folder / f"{n_tasks}{name}", [name]))])
    logs = folder / f"logs{n_tasks}"
    logs.mkdir()
    with servers(commands, logs) as processes:
        ports = list(processes)
        systems = [dict.fromkeys(names, ports[0]), dict.fromkeys(names, ports[1])]
        systems += [dict(zip(names, ports[2:], strict=True))] if apart else []
        for own in systems:  # not measured
            measured(own, processes, argparse.Namespace(**{**vars(args), "seconds": 0.5}), 0)
        rounds: list[list[dict[str, float]]] = [[] for _ in systems]
        for number in range(args.rounds):
            order = list(range(len(systems)))
            for k in order if number % 2 == 0 else order[::-1]:
                rounds[k].append(measured(systems[k], processes, args, 1 + number))
    row: dict[str, Any] = {"tasks": n_tasks, "clients": args.clients, "seconds": args.seconds}
    for name, own in zip(SYSTEMS, rounds, strict=False):
        row[name] = {key: spread([one[key] for one in own], 2) for key in own[0]}
    return row


def table(results: list[dict[str, Any]]) -> str:
    """Return the page's table of ``serve_load.json``."""
    lines = [
        "| tasks | system | requests a second | p50, ms | p99, ms | servers' processor time, ms | "
        "sequences a forward |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results[0]["rows"]:
        for name in SYSTEMS:
            if name not in row:
                lines.append(f"| {row['tasks']} | {name} | not run | | | | |")
                continue
            cells = [ranged(row[name][key], 0) for key in ("requests_per_s", "p50_ms", "p99_ms")]
            for key, digits in (("cpu_ms", 2), ("rows_per_forward", 1)):
                cells.append(ranged(row[name][key], digits) if key in row[name] else "")
            lines.append(f"| {row['tasks']} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@one_line_errors()
def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--most-processes", type=int, default=64)
    parser.add_argument("--name", default="serve_load", help="of the result")
    args = parser.parse_args()
    check_rounds(args.rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = make_bundle(folder)
        rows = []
        for n_tasks in args.tasks:
            rows.append(compared(one, folder, n_tasks, args))
            print(table([{"rows": rows[-1:]}]), flush=True)
    print(save(args.name, rows))


if __name__ == "__main__":
    main()

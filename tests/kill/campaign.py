"""Commands killed at random moments, started again, and compared with what they leave when never killed.

    python tests/kill/campaign.py --n 50 [--only bbt,tune] [--seed 0]        (make kill N=50)

Each case starts a command, kills it with SIGKILL after a random share of the time that it takes unbroken, one
to four times, lets it end, and compares what it left byte for byte, but for times and places. Exit 1 and the
number of the case where something differs; a case is drawn from its number and ``--seed``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMES = ("seconds", "load", "forward_s", "suggest_s", "hidden_s", "journal_s", "other_s")
OTHER = {*TIMES, "crc32", "run_dir"}  # differs from run to run
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TIMEOUT_S = 1200


@dataclass(frozen=True)
class Kind:
    """A command in a folder of its own: how it starts, how it goes on, what of its files must be the same."""

    start: list[str]
    go_on: Callable[[Path], list[str]] | None  # None: by starting it again
    left: Callable[[Path], Any]


def mp2(*words: object) -> list[str]:
    return [sys.executable, "-m", "mp2", *map(str, words)]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(inner) for name, inner in value.items() if name not in OTHER}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def runs_left(folder: Path) -> Any:
    """Of every run: journal and result without times, the prompt's bytes."""
    found = {}
    for run in sorted((folder / "runs").iterdir()):
        lines = [json.loads(line) for line in (run / "journal.jsonl").read_text("utf-8").splitlines()]
        result = json.loads((run / "result.json").read_text("utf-8"))
        prompt = hashlib.sha256((run / "prompt.safetensors").read_bytes()).hexdigest()
        name = run.name.rsplit("-", 2)[0]
        found[name] = (without_times(lines), without_times(result), prompt, partials(run))
    return found


def partials(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*.part")]


def files_left(*names: str) -> Callable[[Path], Any]:
    """Hashes of files."""

    def left(folder: Path) -> Any:
        return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}

    return left


def tree_left(*names: str) -> Callable[[Path], Any]:
    """Hashes of all files below folders, but for those that tell the time."""

    def left(folder: Path) -> Any:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for name in names
            for path in sorted((folder / name).rglob("*"))
            if path.is_file()
        }

    return left


def tuned_left(folder: Path) -> Any:
    """``mp2 tune`` keeps no checkpoint: the last run, started again, is what one unbroken leaves."""
    run = sorted(path.parent for path in (folder / "runs").glob("*/result.json"))[-1]
    result = json.loads((run / "result.json").read_text("utf-8"))
    prompt = hashlib.sha256((run / "prompt.safetensors").read_bytes()).hexdigest()
    return without_times(result)["stages"], prompt


def resume_all(folder: Path) -> list[str]:
    """Go on with the runs that have begun; those that have no config yet are started again."""
    begun = [path.parent for path in folder.glob("runs/*/config.json")]
    return mp2("bbt", "--resume", "runs") if begun else []


def kinds(world: Path) -> dict[str, Kind]:
    """The commands, over the files in ``world``."""
    bbt = (
        "bbt",
        "--task",
        "demo_topic",
        "--iters",
        60,
        "--router-iters",
        20,
        "--threads",
        1,
        "--out",
        "runs",
    )
    fast = ("--test-limit", 20, "--no-baselines", "--quiet")
    pretrain = ("--steps", 60, "--modules", 2, "--prompt-tokens", 4, "--intrinsic-dim", 8, "--max-tokens", 64)
    backbone = (
        "--layers",
        1,
        "--hidden",
        16,
        "--heads",
        2,
        "--vocab-size",
        150,
        "--steps",
        120,
        "--length",
        32,
    )
    return {
        "bbt": Kind(mp2(*bbt, *fast), resume_all, runs_left),
        "series": Kind(mp2(*bbt, *fast, "--seeds", "8,13"), resume_all, runs_left),
        "tune": Kind(
            mp2(
                *("tune", "--task", "demo_topic", "--epochs", 4, "--no-test", "--no-baselines"),
                *("--threads", 1, "--out", "runs", "--quiet"),
            ),
            None,
            tuned_left,
        ),
        "pretrain": Kind(
            mp2(
                *("pretrain", "--tasks", "demo_topic", *pretrain, "--dev-limit", 20, "--threads", 1),
                *("--checkpoint-minutes", 0, "--out", "out"),
            ),
            None,
            files_left(
                "out/prompts.safetensors", "out/losses.jsonl", "out/dev_scores.jsonl", "out/scores.json"
            ),
        ),
        "pretrain-backbone": Kind(
            mp2(
                *("pretrain-backbone", "--corpus", world / "corpus", *backbone, "--precision", "fp32"),
                *("--threads", 1, "--checkpoint-minutes", 0, "--out", "out"),
            ),
            None,
            files_left("out/model.safetensors", "out/mlm_losses.jsonl", "out/vocab.txt", "out/config.json"),
        ),
        "export": Kind(mp2("export", "--backbone", "mini", "--out", "engine"), None, tree_left("engine")),
        "fetch": Kind(
            mp2("tasks", "fetch", world / "card.toml", "--to", "data"),
            None,
            files_left("data/kill/train.jsonl", "data/kill/dev.jsonl"),
        ),
    }


CARD = """task = "kill"
family = "test"
type = "classification"
template = "“{{text}}”，选项：{{options}}"
metric = "accuracy"
track = "extra"
version = 1
[labels]
a = "好"
b = "坏"
[source]
licence = "none"
[source.files]
train = "{address}/train.jsonl"
dev = "{address}/dev.jsonl"
"""


def make_world(root: Path, address: str) -> None:
    """Text to train on, and a card whose data lie on a server of our own."""
    (root / "corpus").mkdir(parents=True)
    (root / "served").mkdir()
    rng = random.Random(0)
    text = "".join(rng.choice("天地人你我他上下来去大小多少好坏新旧。，\n") for _ in range(6000))
    (root / "corpus" / "a.txt").write_text(text, "utf-8")
    for split, n in (("train", 3000), ("dev", 500)):
        lines = (json.dumps({"text": f"{split} 第 {i} 句", "label": "ab"[i % 2]}) for i in range(n))
        (root / "served" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (root / "card.toml").write_text(CARD.format(address=address), "utf-8")


def run(command: list[str], folder: Path, after_s: float | None) -> int:
    """The exit status of a command that is killed after some seconds (None: never)."""
    with (folder / "said.txt").open("ab") as said:
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=said, stderr=said)
        try:
            return process.wait(TIMEOUT_S if after_s is None else after_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return process.wait()


def unbroken(kind: Kind, folder: Path) -> tuple[Any, float]:
    """What a command leaves that is not killed, and how long it takes."""
    folder.mkdir(parents=True)
    start = time.monotonic()
    status = run(kind.start, folder, None)
    if status != 0:
        raise SystemExit(f"exit {status} without a kill: {(folder / 'said.txt').read_text('utf-8')[-2000:]}")
    return kind.left(folder), time.monotonic() - start


def killed(kind: Kind, folder: Path, seconds: float, rng: random.Random) -> tuple[Any, int, float]:
    """What a command leaves that is killed and started again, how often it was, how long a whole one takes.

    The machine may be faster now than when ``seconds`` was measured: where the command ends before the first
    kill, it is started anew in an empty folder, with the time that it took.
    """
    for _ in range(9):
        folder.mkdir(parents=True)
        start, after_s = time.monotonic(), rng.uniform(0.1, 1.0) * seconds
        if (status := run(kind.start, folder, after_s)) != 0:
            break
        seconds = min(seconds, time.monotonic() - start)
        shutil.rmtree(folder)
    else:
        raise SystemExit(f"{folder}: ends before it can be killed, nine times")
    command, n_kills, more = kind.start, 0, rng.randint(0, 3)
    while status == -signal.SIGKILL:
        n_kills += 1
        if kind.go_on is not None:
            command = kind.go_on(folder) or kind.start
            if command is kind.start:
                shutil.rmtree(folder / "runs", ignore_errors=True)  # folders without a config are no runs
        status = run(command, folder, rng.uniform(0.1, 1.05) * seconds if n_kills <= more else None)
        if status == 0:
            return kind.left(folder), n_kills, seconds
    raise SystemExit(f"exit {status}, no kill: {(folder / 'said.txt').read_text('utf-8')[-2000:]}")


def kill_server(bundle: Path, rng: random.Random) -> bool:
    """Whether a server that is killed, while it starts too, and started again gives the answer of before."""
    answers = []
    for at_start in (False, True, False):
        port = rng.randint(20000, 60000)
        command = mp2("serve", "--bundle", bundle, "--port", port, "--host", "127.0.0.1")
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            if at_start:
                time.sleep(rng.uniform(0.2, 6))
            else:
                answers.append(_answer(port, process))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    return answers[0] == answers[1]


def _answer(port: int, process: subprocess.Popen[bytes]) -> bytes:
    data = json.dumps({"text": "今天的比赛很精彩"}).encode()
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        try:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/tasks/demo_topic", data)
            with urllib.request.urlopen(request, timeout=30) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the server does not answer")


def main() -> int:
    """Run the campaign; 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--only", default="bbt,series,tune,pretrain,pretrain-backbone,export,fetch,serve")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    names = asked.only.split(",")
    counts = {name: [0, 0, 0] for name in names}  # cases, kills, differences
    with tempfile.TemporaryDirectory(prefix="mp2-kill-") as temporary, _served(Path(temporary)) as address:
        root = Path(temporary)
        make_world(root / "world", address)
        known = kinds(root / "world")
        whole = {name: unbroken(known[name], root / "whole" / name) for name in names if name in known}
        bundle = root / "bundle"
        if "serve" in names:
            first = whole.get("bbt") or unbroken(known["bbt"], root / "whole" / "bbt")
            assert first
            tuned = next((root / "whole" / "bbt" / "runs").iterdir())
            subprocess.run(mp2("export", "--run", tuned, "--out", bundle), env=ENVIRONMENT, check=True)
        for number in range(asked.n):
            name = names[number % len(names)]
            rng = random.Random(f"{asked.seed} {number}")
            case = root / "case"
            if name == "serve":
                same, n_kills = kill_server(bundle, rng), 3
            else:
                expected, seconds = whole[name]
                found, n_kills, seconds = killed(known[name], case, seconds, rng)
                whole[name] = expected, seconds
                same = found == expected
            counts[name] = [a + b for a, b in zip(counts[name], (1, n_kills, int(not same)), strict=True)]
            print(f"{number} {name}: {n_kills} kills, {'equal' if same else 'DIFFERENT'}", flush=True)
            if not same and case.exists():
                kept = Path(tempfile.mkdtemp(prefix=f"mp2-killed-{name}-"))
                shutil.copytree(case, kept / "case")
                print(f"  kept in {kept}", flush=True)
            shutil.rmtree(case, ignore_errors=True)
    keys = ("cases", "kills", "different")
    print(json.dumps({name: dict(zip(keys, values, strict=True)) for name, values in counts.items()}))
    return int(any(values[2] for values in counts.values()))


class _served:
    """The files of ``root/world/served`` on a port of this machine."""

    def __init__(self, root: Path) -> None:
        import threading
        from functools import partial
        from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

        class Quiet(SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Say nothing."""

        handler = partial(Quiet, directory=str(root / "world" / "served"))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()


if __name__ == "__main__":
    sys.exit(main())

"""OpenVINO's provider for ONNX Runtime on this CPU: its time for the whole graph, and what it computes.

``backbone.onnx`` of a backbone on ONNX Runtime's own CPU provider and on OpenVINO's plugin (package
``onnxruntime-ep-openvino``), as it comes and told to compute in float32 (``INFERENCE_PRECISION_HINT``), each
on one thread: processor time of a forward in milliseconds, in alternating rounds, and the largest difference
of a logit from ONNX Runtime's. Forwards are of one shape again and again, and of as many shapes as there are,
which is what a server has. Exits 1 where a provider takes more processor time than the clock shows, as on
several threads: OpenVINO's number of threads is a setting of its own.

    python -m benchmarks.speed.openvino [--backbone mini] [--rounds 5]

A minute. Result: ``openvino.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import one_line_errors
from benchmarks.provenance import save
from benchmarks.speed.rounds import check_rounds, ranged, spread
from mp2.backbone import load_backbone
from mp2.engine.onnx.library import load_onnxruntime
from mp2.engine.onnx.plugins import PLUGINS, add_plugin
from mp2.errors import Mp2Error
from mp2.export import export_engine

ROWS, TOKENS, PROMPT_ROWS = 32, 48, 16
SETTINGS: dict[str, dict[str, str] | None] = {
    "ONNX Runtime": None,
    "OpenVINO": {"load_config": json.dumps({"CPU": {"INFERENCE_NUM_THREADS": 1}})},
    "OpenVINO, float32": PLUGINS["openvino"].settings(1),
}
_ONE_THREAD = 1.2  # times the clock; several threads take nearly so many times
OUTPUTS = ["start_logits", "end_logits"]
Feeds = dict[str, np.ndarray]


def session(graph: Path, settings: dict[str, str] | None) -> Any:
    """Return a session of ``graph`` on one thread: OpenVINO's with ``settings``, None the CPU's own."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if settings is None:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    add_plugin(options, "openvino", settings)
    return ort.InferenceSession(graph, options)


def feeds(config: Any) -> Feeds:
    """Return random inputs of the graph: texts of one length under prompts of their own."""
    rng = np.random.default_rng(0)
    shape = (ROWS, config.n_layers, config.n_heads, PROMPT_ROWS, config.head_size)
    keys, values = rng.standard_normal((2, *shape)).astype(np.float32)
    return {
        "input_ids": rng.integers(5, config.vocab_size, (ROWS, TOKENS)),
        "attention_mask": np.ones((ROWS, TOKENS), np.int64),
        "segments": np.zeros((ROWS, 1, 2), np.int64),
        "prompt_length": np.full(ROWS, PROMPT_ROWS),
        "prompt_keys": keys,
        "prompt_values": values,
        "span_weight": rng.standard_normal((ROWS, 2, config.hidden)).astype(np.float32),
        "span_bias": np.zeros((ROWS, 2), np.float32),
    }


def part(given: Feeds, rows: int, tokens: int) -> Feeds:
    """Return the first ``rows`` and ``tokens`` of inputs."""
    own = {name: x[:rows] for name, x in given.items()}
    cut = {name: np.ascontiguousarray(own[name][:, :tokens]) for name in ("input_ids", "attention_mask")}
    return own | cut


def cases(given: Feeds) -> dict[str, list[Feeds]]:
    """Return what is timed: the forwards of each case."""
    rng = np.random.default_rng(1)
    sizes = [(int(rng.integers(1, 9)), int(rng.integers(10, TOKENS + 1))) for _ in range(60)]
    return {
        f"{ROWS} x {TOKENS}": [given] * 5,
        "8 x 24": [part(given, 8, 24)] * 20,
        "1 x 24": [part(given, 1, 24)] * 60,
        f"1 to 8 x 10 to {TOKENS}": [part(given, rows, tokens) for rows, tokens in sizes],
    }


def timed(one: Any, forwards: list[Feeds]) -> tuple[float, float]:
    """Return milliseconds of processor time a forward, and processor time over the clock's."""
    clock, processor = time.perf_counter(), time.process_time()
    for given in forwards:
        one.run(OUTPUTS, given)
    spent = time.process_time() - processor
    return 1000 * spent / len(forwards), spent / (time.perf_counter() - clock)


def table(results: list[dict[str, Any]]) -> str:
    """Return the page's table of ``openvino.json``."""
    rows = results[0]["rows"]
    names = [name for name in rows[0] if name != "provider"]
    shown = [name for name in names if name != "error"]
    lines = [f"| provider | {' | '.join(f'{name}, ms' for name in shown)} | largest error of a logit |"]
    lines.append(f"| --- | {'---: | ' * len(shown)}---: |")
    for row in rows:
        times = " | ".join(ranged(row[name], 2) for name in shown)
        lines.append(f"| {row['provider']} | {times} | {row['error']:.1e} |")
    return "\n".join(lines)


@one_line_errors()
def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    check_rounds(args.rounds)
    backbone = load_backbone(args.backbone)
    with tempfile.TemporaryDirectory() as folder:
        graph = export_engine(backbone, Path(folder) / "engine").file("backbone.onnx")
        given = feeds(backbone.config)
        sessions = {name: session(graph, settings) for name, settings in SETTINGS.items()}
        logits = {name: one.run(OUTPUTS, given)[0] for name, one in sessions.items()}
        exact = logits["ONNX Runtime"]
        rows = [{"provider": name, "error": float(np.abs(logits[name] - exact).max())} for name in sessions]
        for case, forwards in cases(given).items():
            times: dict[str, list[float]] = {name: [] for name in sessions}
            for number in range(-1, args.rounds):  # the first opens shapes, and is not kept
                for name in list(sessions) if number % 2 == 0 else list(sessions)[::-1]:
                    ms, threads = timed(sessions[name], forwards)
                    if threads > _ONE_THREAD:
                        raise Mp2Error(f"{name} took {threads:.1f} times the clock, expected one thread")
                    times[name] += [ms] if number >= 0 else []
            for row in rows:
                row[case] = spread(times[row["provider"]], 2)
    print(table([{"rows": rows}]))
    print(save("openvino", rows))


if __name__ == "__main__":
    main()

"""OpenVINO's provider for ONNX Runtime on this CPU: its time for the whole graph, and what it computes.

``backbone.onnx`` of a backbone on ONNX Runtime's own CPU provider and on OpenVINO's plugin (package
``onnxruntime-ep-openvino``), as it comes and told to compute in float32 (``INFERENCE_PRECISION_HINT``):
milliseconds of 32 rows of 48 tokens on one thread, in alternating rounds, and the largest difference of a
logit from ONNX Runtime's.

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
from mp2.engine.onnx.plugins import add_plugin
from mp2.export import export_engine

ROWS, TOKENS, PROMPT_ROWS = 32, 48, 16
SETTINGS: dict[str, dict[str, str] | None] = {
    "ONNX Runtime": None,
    "OpenVINO": {},
    "OpenVINO, float32": {"load_config": json.dumps({"CPU": {"INFERENCE_PRECISION_HINT": "f32"}})},
}


def session(graph: Path, settings: dict[str, str] | None) -> Any:
    """Return a session of ``graph`` on one thread: OpenVINO's with ``settings``, None the CPU's own."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if settings is None:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    add_plugin(options, "openvino", {**settings, "num_of_threads": "1"})
    return ort.InferenceSession(graph, options)


def feeds(config: Any) -> dict[str, np.ndarray]:
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


def table(results: list[dict[str, Any]]) -> str:
    """Return the page's table of ``openvino.json``."""
    lines = ["| provider | ms | largest error of a logit |", "| --- | ---: | ---: |"]
    for row in results[0]["rows"]:
        lines.append(f"| {row['provider']} | {ranged(row['ms'], 1)} | {row['error']:.1e} |")
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
        logits = {name: one.run(["start_logits"], given)[0] for name, one in sessions.items()}
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(args.rounds):
            for name, one in sessions.items():
                started = time.perf_counter()
                one.run(["start_logits"], given)
                times[name].append(1000 * (time.perf_counter() - started))
    exact = logits["ONNX Runtime"]
    rows = [
        {"provider": name, "ms": spread(times[name], 2), "error": float(np.abs(logits[name] - exact).max())}
        for name in sessions
    ]
    print(table([{"rows": rows}]))
    print(save("openvino", rows))


if __name__ == "__main__":
    main()

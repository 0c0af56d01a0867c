"""The graphs of a bundle in ONNX Runtime, and its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mp2.engine.bundle import Bundle
from mp2.engine.onnx.library import load_onnxruntime
from mp2.errors import FormatError, MissingDependencyError, Mp2Error
from mp2.export.bundle_files import reading
from mp2.limits import usable_cores


class ServedBundle:
    """A verified bundle, its graphs loaded; forwards may be run from one thread at a time."""

    def __init__(self, path: str | Path, *, device: str = "cpu", threads: int | None = None) -> None:
        """Load every graph of the bundle.

        Raises FormatError (a bundle that is damaged), MissingDependencyError (no CUDA provider), Mp2Error (a
        graph that ONNX Runtime refuses).
        """
        self.bundle = Bundle.open(path)
        manifest = self.bundle.manifest
        self.graphs: Mapping[str, Any] = {Path(graph).stem: x for graph, x in manifest["graphs"].items()}
        self.positions, self.vocab_size = (
            int(manifest["limits"]["positions"]),
            manifest["backbone"]["vocab_size"],
        )
        self.tokenizer, self.tasks = reading.load(self.bundle.path)
        if not self.tasks:
            raise FormatError("no tasks; write the bundle again", path=self.bundle.path, field="tasks")
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.log_severity_level = 4  # what goes wrong is raised, too
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # tokenizing needs the cores
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda":
            if "CUDAExecutionProvider" not in ort.get_available_providers():
                raise MissingDependencyError(
                    "--device cuda needs the package onnxruntime-gpu in place of onnxruntime: "
                    "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
                )
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
        self._sessions = {}
        for graph in manifest["graphs"]:
            try:
                session = ort.InferenceSession(
                    self.bundle.file(graph), options, providers=providers, enable_fallback=0
                )
            except Exception as error:  # onnxruntime's have no common base
                why = (str(error) or type(error).__name__).splitlines()[0]
                raise Mp2Error(
                    f"onnxruntime {ort.__version__} cannot load {graph} in {self.bundle.precision} on "
                    f"{device}: {why}; export the runs with --precision fp32"
                ) from error
            if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
                raise MissingDependencyError(
                    "onnxruntime left CUDA out: install the CUDA and cuDNN that it was built for"
                )
            self._sessions[Path(graph).stem] = session

    def run(
        self, graph: str, feeds: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Return the named outputs of ``graph`` (without .onnx)."""
        return dict(zip(outputs, self._sessions[graph].run(list(outputs), dict(feeds)), strict=True))

    def run_rows(
        self, tasks: Sequence[reading.Task], rows: Sequence[reading.Row]
    ) -> list[dict[str, np.ndarray]]:
        """Return the outputs that answers are made of, for each of ``rows``, in one forward of one graph."""
        tasks, rows = list(tasks), list(rows)
        names = reading.outputs(tasks)
        found = self.run(graph_of(tasks[0]), reading.feeds(tasks, rows), names)
        return [{name: found[name][k] for name in names} for k in range(len(rows))]


def graph_of(task: reading.Task) -> str:
    """Return the name of the graph that a task runs on, without .onnx."""
    return Path(task["graph"]).stem

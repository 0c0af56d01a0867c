"""The graphs of a bundle or an engine folder in ONNX Runtime, and the bundle's tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from mp2.engine.bundle import BUNDLE_FORMAT, Bundle
from mp2.engine.folder import MANIFEST, EngineFolder
from mp2.engine.onnx.library import load_onnxruntime
from mp2.engine.onnx.model_files import load_session, read_model
from mp2.engine.onnx.providers import Provider
from mp2.errors import FormatError, Mp2Error
from mp2.export.bundle_files import reading
from mp2.json_files import Fields, check, list_of, number, one_of, read_object, text, whole
from mp2.limits import usable_cores

_TYPES = {"tensor(int64)": "int64", "tensor(float)": "float32"}
_ONE_TYPE = " or ".join(_TYPES)
_INPUTS = {"input_ids": ["N", "T"], "attention_mask": ["N", "T"], "prompt_length": ["P"]}  # of every graph
WHOLE_GRAPHS = ("backbone.onnx", "backbone_inline.onnx")  # of an engine folder


class ServedBundle:
    """A verified folder, its graphs loaded; forwards may be run from one thread at a time.

    ``graphs`` are name (without .onnx) -> inputs and outputs -> name -> dtype and shape. An engine folder has
    graphs and no ``tasks``.
    """

    def __init__(self, path: str | Path, *, device: str = "cpu", threads: int | None = None) -> None:
        """Load every graph of the bundle or engine folder at ``path``.

        Raises FormatError (a folder that is damaged), MissingDependencyError (no such provider, or no device
        of it), Mp2Error (a graph that ONNX Runtime refuses).
        """
        self._path = Path(path)
        self.tasks: dict[str, reading.Task] = {}
        folder, files = self._bundle() if _is_bundle(self._path) else self._engine_folder()
        self._threads = threads or usable_cores()
        self._provider = Provider(kind=device, device="cuda" if device == "cuda" else "cpu")
        self._provider.check()
        self._sessions = {}
        self.graphs: dict[str, Any] = {}
        for graph in files:
            session = self._sessions[Path(graph).stem] = self._session(folder, graph)
            self.graphs[Path(graph).stem] = _interface(session, folder.path / graph)
        for task in self.tasks.values():
            _check_task(task, self.graphs[graph_of(task)], self._path)

    def _session(self, folder: Bundle | EngineFolder, graph: str) -> Any:
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4  # what goes wrong is raised, too
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # tokenizing needs the cores
        model = read_model(folder, graph)
        try:
            session = load_session(model, options, self._provider.choose(options, "", {}, None))
        except Exception as error:  # onnxruntime's have no common base
            if isinstance(error, Mp2Error):
                raise
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise Mp2Error(
                f"onnxruntime {ort.__version__} cannot load {graph} in {self.precision} on "
                f"{self._provider.kind}: {why}; export the runs with --precision fp32"
            ) from error
        self._provider.check_session(session.get_providers())
        return session

    def _bundle(self) -> tuple[Bundle, list[str]]:
        """Take a bundle's tasks and limits; return it, and its graphs' files."""
        bundle = Bundle.open(self._path)
        manifest = bundle.manifest
        backbone = manifest["backbone"]
        self.backbone, self.backbone_sha256 = str(backbone["name"]), str(backbone["sha256"])
        self.positions, self.vocab_size = int(manifest["limits"]["positions"]), int(backbone["vocab_size"])
        self.precision = bundle.precision
        self.tokenizer, self.tasks = _tasks(bundle)
        return bundle, list(manifest["graphs"])

    def _engine_folder(self) -> tuple[EngineFolder, list[str]]:
        folder = EngineFolder.open(self._path)
        entry = folder.manifest.backbone
        self.backbone, self.backbone_sha256 = entry.name, entry.sha256
        self.positions, self.vocab_size = folder.manifest.max_tokens, entry.vocab_size
        self.precision = folder.precision
        files = [name for name in WHOLE_GRAPHS if name in folder.files]
        if not files:
            raise FormatError(
                "an engine folder without whole graphs, which only those in fp32 have; export it again "
                "without --precision, or give a bundle of 'mp2 export --run'",
                path=self._path,
            )
        return folder, files

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


def _interface(session: Any, path: Path) -> dict[str, Any]:
    """Return a graph's inputs and outputs; FormatError where they are not those of a whole backbone.

    A stranger's graph may have hashes that fit.
    """
    found: dict[str, Any] = {"inputs": {}, "outputs": {}}
    for side, nodes in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        for node in nodes:
            if node.type not in _TYPES:
                raise FormatError(f"'{node.name[:60]}' is {node.type}, expected {_ONE_TYPE}", path=path)
            found[side][node.name] = {"dtype": _TYPES[node.type], "shape": node.shape}
    for name, shape in _INPUTS.items():
        got = found["inputs"].get(name, {}).get("shape")
        if got != shape:
            raise FormatError(f"input '{name}' has shape {got}, expected {shape}", path=path)
    return found


def _check_task(task: reading.Task, interface: Mapping[str, Any], path: Path) -> None:
    """Raise FormatError unless the graph takes a task's tensors and gives what its head reads."""
    own = {name: x.shape for name, x in task["tensors"].items() if not name.startswith("ridge_")}
    about = f"task {task['name'][:60]!r}"
    for name in interface["inputs"].keys() - {*_INPUTS, "segments"} - own.keys():
        raise FormatError(f"{about} has no '{name}', which its graph takes", path=path)
    for name, shape in own.items():
        declared = interface["inputs"].get(name, {}).get("shape", [])[1:]
        if len(declared) != len(shape) or any(
            size not in (own_size, "m") for size, own_size in zip(declared, shape, strict=True)
        ):
            raise FormatError(
                f"{about} has '{name}' of shape {list(shape)}, its graph takes {declared}", path=path
            )
    if missing := [name for name in reading.outputs([task]) if name not in interface["outputs"]]:
        raise FormatError(f"{about} reads '{missing[0]}', which its graph does not give", path=path)


def _tasks(bundle: Bundle) -> tuple[tokenizers.Tokenizer, dict[str, reading.Task]]:
    """Return a bundle's tokenizer and tasks; FormatError where its files, whose hashes fit, hold neither.

    The reader is the one that bundles bring, which trusts them; whoever makes a bundle makes its hashes.
    """
    try:
        tokenizer, tasks = reading.load(bundle.path, bundle.read)
        for name, task in tasks.items():
            check(task, _TASK, bundle.path / bundle.manifest["tasks"][name]["card"])
            if not all(np.isfinite(tensor).all() for tensor in task["tensors"].values()):
                raise FormatError(f"the tensors of task {name[:60]!r} hold NaN or infinity", path=bundle.path)
            if task["graph"] not in bundle.manifest["graphs"]:
                raise FormatError(f"task {name[:60]!r} runs on a graph that is not there", path=bundle.path)
    except FormatError:
        raise
    except BaseException as error:  # the tokenizers' panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:200]
        raise FormatError(
            f"not tasks and a tokenizer of a bundle: {type(error).__name__}: {said}", path=bundle.path
        ) from error
    return tokenizer, tasks


_IDS = list_of(whole(0, 2**31 - 1))
_TASK = Fields(
    {
        "type": one_of("classification", "extraction", "multiple_choice"),
        "head": one_of("span", "mlm", "ridge"),
        "fields": list_of(text),
        "graph": text,
        "room": whole(),
        "prompt_length": whole(0, 2**31 - 1),
        "parts": list_of(Fields({"ids": _IDS})),
        "options": list_of(Fields({"ids": _IDS})),
        "before": _IDS,
        "after": _IDS,
    },
    {"temperature": number(0)},
)


def graph_of(task: reading.Task) -> str:
    """Return the name of the graph that a task runs on, without .onnx."""
    return Path(task["graph"]).stem


def _is_bundle(path: Path) -> bool:
    """Tell whether a folder is meant to be a bundle: what is neither is no bundle, in its words."""
    try:
        raw = read_object(path / MANIFEST)
    except (OSError, FormatError):
        return True
    return raw.get("format") == BUNDLE_FORMAT or "max_tokens" not in raw

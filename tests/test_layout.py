"""Where things lie: no package imports its importer, and the walks that matter are short."""

from __future__ import annotations

import ast
import functools
import gc
import sys
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from click.testing import CliRunner

import mp2
from mp2.cli import main
from mp2.engine.cpu.differences import DifferenceBackend
from mp2.engine.objective import Objective
from mp2.optimizers.cma_layers import LayerCma
from mp2.optimizers.config import RouterConfig
from mp2.runs.config import BbtConfig
from mp2.runs.predict import Predictor
from mp2.runs.series import start_run

ROOT = Path(mp2.__file__).parent
MOST_MODULES = 10
# a package may import its own level's and lower ones, but two of one level never each other
LEVELS = (
    (
        "errors",
        "files",
        "folder_lock",
        "journal_lines",
        "json_files",
        "injection",
        "lazy",
        "limits",
        "messages",
        "options",
        "text_files",
        "tensor_files",
        "environment",
        "__version__",
    ),
    ("backbone",),
    ("heads", "tasks", "prompts"),
    ("engine", "optimizers"),
    ("runs", "training", "export", "serve", "doctor"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Parse a file; without the collector, in whose runs Python 3.11's parser loses count (gh-106905)."""
    gc.disable()
    try:
        return ast.parse(path.read_text("utf-8"))
    finally:
        gc.enable()


def imports(root: Path = ROOT) -> Iterator[tuple[str, str, Path]]:
    """(importer, imported, file) of packages and lone modules below ``root``, wherever in a file."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if parts == ("__init__.py",):
            continue
        importer = parts[0].removesuffix(".py")
        for node in ast.walk(parsed(path)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                top, _, rest = name.partition(".")
                imported = rest.split(".")[0]
                if top == "mp2" and imported and imported != importer:
                    yield importer, imported, path


def circles(edges: Collection[tuple[str, str]]) -> list[str]:
    """Names that lead back to themselves."""
    below = {name: {b for a, b in edges if a == name} for edge in edges for name in edge}
    for _ in below:
        below = {name: found.union(*(below[x] for x in found)) for name, found in below.items()}
    return sorted(name for name, found in below.items() if name in found)


def wrong_arrows(root: Path) -> dict[str, Any]:
    """What points up, or in a circle, or has no place in LEVELS."""
    edges = {(a, b): path for a, b, path in imports(root)}
    unknown = {name for edge in edges for name in edge} - set(LEVEL)
    upward = {edge: path for edge, path in edges.items() if LEVEL.get(edge[1], 0) > LEVEL.get(edge[0], 0)}
    found = {"unknown": unknown, "upward": upward, "circles": circles(edges)}
    return {kind: names for kind, names in found.items() if names}


def test_arrows_point_down_and_no_package_imports_its_importer() -> None:
    assert wrong_arrows(ROOT) == {}


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("engine/folder.py", "from mp2.backbone import load", {}),
        ("engine/folder.py", "import mp2.export.graphs", {"upward": ("engine", "export")}),
        ("heads/span.py", "def f():\n    from mp2.tasks.mrc import g", {"circles": ["heads", "tasks"]}),
        ("somewhere/new.py", "from mp2 import errors", {"unknown": {"somewhere"}}),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path: Path, file: str, line: str, expected: dict[str, Any]) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mrc.py").write_text("from mp2.heads import span\n", "utf-8")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"{line}\n", "utf-8")
    found = wrong_arrows(tmp_path)
    if "upward" in found:
        (found["upward"],) = found["upward"]
    assert found == expected


def run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What stands in a file, without what is there for types only."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from run_nodes(child)


def comes_back(walk: list[str]) -> list[str]:
    """Modules of a walk to which its reader returns: they import one another in a circle."""
    edges = set()
    for module in walk:
        path = ROOT.joinpath(*module.split(".")[1:])
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
            for node in run_nodes(parsed(file)):
                if isinstance(node, ast.ImportFrom):
                    names = {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
                    edges |= {(module, x) for x in {*map(stop, names)} & {*walk} - {module}}
    assert edges
    return circles(edges)


def test_optimizers_know_nothing_of_the_engine_and_the_engine_nothing_of_what_uses_it() -> None:
    found = {name: {b for a, b, _ in imports() if a == name} for name in ("optimizers", "engine")}
    assert found["optimizers"] <= {"errors", "lazy", "limits", "options"}
    lone = {"errors", "files", "json_files", "lazy", "limits", "messages", "text_files"}
    assert found["engine"] <= {*lone, "backbone", "heads", "tasks", "prompts"}


def test_backends_are_told_apart_in_one_place_only() -> None:
    """No test for a backend's class or name outside of engine/select.py and the backends' own folders."""
    classes = (
        "CpuBackend",
        "DifferenceBackend",
        "CudaBackend",
        "OnnxBackend",
        "ChainBackend",
    )
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                assert not any(name in ast.unparse(node.args[1]) for name in classes), path


def stop(module: str) -> str:
    """A module as a stop of a walk; what lies behind the engine's seam, a backend's folder, is one."""
    parts = module.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["mp2", "engine"] and len(parts) > 3 else module


def called(frame: FrameType, event: str) -> str | None:
    """The stop that a call is a call of; what dataclasses write for themselves is none."""
    module = frame.f_globals.get("__name__", "")
    written = event == "call" and "<string>" not in frame.f_code.co_filename
    return stop(module) if written and module.startswith("mp2.") else None


def test_from_ask_to_loss_is_a_short_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[list[str]] = []
    ask = LayerCma.ask

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if (found := called(frame, event)) and found not in walks[-1]:
            walks[-1].append(found)
        if event == "return" and frame.f_code is Objective.layer_losses.__code__:
            sys.setprofile(None)

    def watched_ask(self: LayerCma) -> Any:
        walks.append(["mp2.optimizers.cma_layers"])
        sys.setprofile(watch)
        return ask(self)

    monkeypatch.setattr(LayerCma, "ask", watched_ask)
    config = BbtConfig(
        task="demo_topic",
        head="span",
        iters=48,
        router=RouterConfig(iterations=8),
        runtime="torch",
        threads=1,
        test=False,
        baselines=False,
        shots=2,
    )
    start_run(config, tmp_path)
    assert len(walks) == 2
    for walk in walks:
        assert {"mp2.optimizers.two_stage", "mp2.engine.objective", "mp2.engine.cpu"} <= set(walk)
        assert len(walk) <= MOST_MODULES, "\n".join(walk)
        assert comes_back(walk) == []


def test_from_a_line_to_its_label_is_a_short_walk(tmp_path: Path) -> None:
    config = BbtConfig(
        task="demo_topic",
        head="span",
        iters=24,
        router=RouterConfig(method="none"),
        runtime="torch",
        threads=1,
        test=False,
        baselines=False,
        shots=2,
    )
    start_run(config, tmp_path)
    predictor = Predictor(next(tmp_path.iterdir()))
    walk: list[str] = []

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if (found := called(frame, event)) and found not in walk:
            walk.append(found)

    sys.setprofile(watch)
    try:
        (line,) = predictor.predict_lines(["今天的比赛很好看".encode()], "-")
    finally:
        sys.setprofile(None)
    assert line["label"] in predictor.card.labels
    assert {"mp2.runs.predict", "mp2.tasks.mrc", "mp2.engine.cpu", "mp2.tasks.decode"} <= set(walk)
    assert len(walk) <= MOST_MODULES, "\n".join(walk)
    assert comes_back(walk) == []


def test_from_precision_to_the_backend_is_a_short_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: list[list[str]] = []

    def made(self: DifferenceBackend, *arguments: Any, **options: Any) -> None:
        assert options["precision"] == "bf16"
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_stack(None)]
        stacks.append([name for name in modules[::-1] if name.startswith("mp2.")])
        raise KeyboardInterrupt

    monkeypatch.setattr(DifferenceBackend, "__init__", made)
    options = ["--task", "demo_topic", "--precision", "bf16", "--runtime", "torch", "--out", str(tmp_path)]
    CliRunner().invoke(main, ["bbt", *options])
    (stack,) = stacks
    walk = [name for k, name in enumerate(stack) if k == 0 or stack[k - 1] != name]
    assert walk[-1] == "mp2.engine.select"
    assert len(walk) == len(set(walk)) < MOST_MODULES, walk

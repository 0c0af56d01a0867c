"""Cells: independent pieces of a table or figure, each one JSON file, computed once by whoever gets to it.

A cell is one method on one task with one seed (and, for Figure 4b, a number of examples). Started again, a
command computes what is missing. Cells of other settings or weights are never mixed: a folder is claimed by
the first command. Where they are computed: in this process, in several of this machine (``--jobs``), or on a
Ray cluster (``--ray ADDRESS``, ``local`` for one of this machine; ``pip install 'mp2[ray]'``); its nodes
must see data, backbone and work folder under the same paths, and this process writes what they return.

A cell that fails is noted in the folder ``failed`` and the others go on; the next command tries it again.
With a budget no cell is begun that would, by what others of its method took, end after it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from filelock import FileLock, Timeout

from benchmarks.paper.methods import Lab, Settings
from mp2.errors import MismatchError, MissingDependencyError, UsageError
from mp2.files import write_json, write_text
from mp2.runs.series import one_blas_thread, sigterm_exits
from mp2.tasks import load_card

Show = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """What is computed; ``shots`` are examples a label (None: the card's)."""

    method: str
    task: str
    seed: int
    shots: int | None = None

    @property
    def name(self) -> str:
        """Of its file, without the ending."""
        shots = "" if self.shots is None else f".{self.shots}shots"
        return f"{Path(self.task).stem}.{self.method}.{self.seed}{shots}"


def cell_file(work: Path, cell: Cell) -> Path:
    """Where a cell's result lies."""
    return work / "cells" / f"{cell.name}.json"


def read_cells(work: Path) -> list[dict[str, Any]]:
    """All finished cells, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((work / "cells").glob("*.json"))]


def claim_folder(work: Path, wanted: dict[str, Any]) -> None:
    """Write what the folder's cells share, or compare with what stands there.

    Raises:
        MismatchError: its cells were made with other settings or weights.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / "settings.json"
    with FileLock(work / "settings.lock"):
        if not path.exists():
            write_json(path, wanted)
            return
        found = json.loads(path.read_text())
    for name in wanted:
        if found.get(name) != json.loads(json.dumps(wanted[name])):
            raise MismatchError(
                f"the cells in {work} were made with {name} {found.get(name)}, got {wanted[name]}: "
                "take the same, or another --work"
            )


def run_cell(lab: Lab, cell: Cell, where_from: dict[str, Any]) -> dict[str, Any]:
    """Run one cell; a task that the backbone or the method cannot have is a result too."""
    card = load_card(cell.task)
    found: dict[str, Any] = {"task": card.task, "track": card.track, "metric": card.metric}
    found |= {"method": cell.method, "seed": cell.seed, "shots": cell.shots}
    cpu, wall = time.process_time(), time.perf_counter()
    reason = lab.refusal(cell.method, card)
    if reason is None:
        result = lab.run(cell.method, cell.task, cell.seed, cell.shots)
        kept = ("stages", "iterations", "router", "learning_rate", "curve")
        found |= {key: result[key] for key in kept if key in result}
    else:
        found["refused"] = reason
    found["cpu_s"] = round(time.process_time() - cpu, 2)
    found["wall_s"] = round(time.perf_counter() - wall, 2)
    return found | {"provenance": where_from}


def failed_file(work: Path, cell: Cell) -> Path:
    """Where the error of a cell that failed lies: what it said in one line, then where it came from."""
    return work / "failed" / f"{cell.name}.txt"


def failures(work: Path, cells: Sequence[Cell]) -> dict[str, str]:
    """Name -> error, in one line, of the cells that failed when they were last tried."""
    found = {}
    for cell in cells:
        with contextlib.suppress(FileNotFoundError):
            found[cell.name] = failed_file(work, cell).read_text("utf-8").partition("\n")[0]
    return found


def _keep(work: Path, cell: Cell, compute: Callable[[], dict[str, Any]]) -> str:
    """Write the result of a cell, or the error that it ends with; returns a line of progress."""
    failed = failed_file(work, cell)
    try:
        found = compute()
    except Exception as error:  # whatever it is: the other cells do not depend on this one
        said = " ".join(f"{type(error).__name__}: {error}".split())
        failed.parent.mkdir(exist_ok=True)
        write_text(failed, f"{said}\n\n{traceback.format_exc()}")
        return f"{cell.name}: failed: {said}"
    write_json(cell_file(work, cell), found)
    failed.unlink(missing_ok=True)
    return _line(found)


def _failed_since(work: Path, cell: Cell, began: float) -> bool:
    """Whether a cell failed since ``began`` (`time.time`): in this command, here or in another process."""
    try:
        return failed_file(work, cell).stat().st_mtime >= began
    except FileNotFoundError:
        return False


def expected_s(work: Path, cell: Cell) -> float:
    """Seconds that a cell will take, by those of its method that are there; 0: there are none.

    Of its task, else the mean of all tasks.
    """
    found = [c for c in read_cells(work) if c["method"] == cell.method and "refused" not in c]
    own = [c for c in found if (c["task"], c["shots"]) == (Path(cell.task).stem, cell.shots)]
    return mean(c["wall_s"] for c in own or found) if found else 0.0


def work_through(
    lab: Lab,
    cells: Sequence[Cell],
    where_from: dict[str, Any],
    show: Show = print,
    until: float = math.inf,
) -> None:
    """Compute every cell that is neither there nor in another process's hands.

    ``until``: by the clock of `time.monotonic`, when the last of them shall have ended. What one of a method
    takes is known only after the first, so that the end may be as much later.
    """
    (lab.work / "cells").mkdir(parents=True, exist_ok=True)
    began = time.time()
    for cell in cells:
        file = cell_file(lab.work, cell)
        if file.exists() or _failed_since(lab.work, cell, began):
            continue
        if until < math.inf and (
            time.monotonic() >= until or time.monotonic() + expected_s(lab.work, cell) > until
        ):
            continue
        lock = FileLock(file.with_suffix(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        try:
            if file.exists() or _failed_since(lab.work, cell, began):
                continue
            line = _keep(lab.work, cell, lambda cell=cell: run_cell(lab, cell, where_from))  # type: ignore[misc]
        finally:
            lock.release()
        show(f"{line}  {_left(lab.work, cells)}")


def work_together(
    lab: Lab,
    cells: Sequence[Cell],
    where_from: dict[str, Any],
    jobs: int,
    show: Show,
    until: float = math.inf,
) -> None:
    """``work_through`` in this process and, by the command that was typed, in ``jobs - 1`` more."""
    module = sys.modules["__main__"].__spec__
    name = "benchmarks.paper" if module is None else module.name.removesuffix(".__main__")
    words = [sys.executable, "-m", name, *sys.argv[1:], "--jobs", "1"]
    quiet = subprocess.DEVNULL  # one page is enough; progress and errors are on standard error
    others = [subprocess.Popen(words, stdout=quiet) for _ in range(jobs - 1)]
    torch.set_num_threads(1)
    try:
        with sigterm_exits(), one_blas_thread():
            work_through(lab, cells, where_from, show, until)
            for other in others:
                other.wait()
    finally:
        for other in others:
            other.terminate()


@lru_cache(maxsize=1)
def _lab_of(settings: Settings, data: Path, work: Path) -> Lab:
    """A Ray worker's own, loaded once."""
    torch.set_num_threads(1)
    return Lab(settings, data, work)


def work_with_ray(
    lab: Lab,
    cells: Sequence[Cell],
    where_from: dict[str, Any],
    address: str,
    show: Show,
    until: float = math.inf,
) -> None:
    """Compute what is missing on a Ray cluster, a core (with CUDA a GPU) a cell; write it here.

    ``until`` (see `work_through`): what has not ended by then is given up.

    Raises:
        MissingDependencyError: Ray is not installed.
        UsageError: no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise MissingDependencyError("--ray needs the package ray: pip install 'mp2[ray]'") from None
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        ray.init(
            address=None if address == "local" else address,
            runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
            log_to_driver=False,
            include_dashboard=False if address == "local" else None,
        )
    except (ConnectionError, ValueError) as error:
        raise UsageError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from error
    (lab.work / "cells").mkdir(parents=True, exist_ok=True)
    gpus = 1 if lab.settings.device.startswith("cuda") else 0

    @ray.remote(num_cpus=1, num_gpus=gpus)
    def remote_cell(settings: Settings, data: Path, work: Path, cell: Cell) -> dict[str, Any]:
        with one_blas_thread():
            return run_cell(_lab_of(settings, data, work), cell, where_from)

    try:
        missing = [cell for cell in cells if not cell_file(lab.work, cell).exists()]
        waiting = {
            remote_cell.remote(lab.settings, lab.data.resolve(), lab.work.resolve(), cell): cell
            for cell in missing
        }
        while waiting:
            left = None if until == math.inf else max(0.0, until - time.monotonic())
            ended, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
            if not ended:
                break
            cell = waiting.pop(ended[0])
            line = _keep(lab.work, cell, lambda done=ended[0]: ray.get(done))  # type: ignore[misc]
            show(f"{line}  {_left(lab.work, cells)}")
    finally:
        ray.shutdown()


def _line(cell: dict[str, Any]) -> str:
    shots = "" if cell["shots"] is None else f" {cell['shots']} shots"
    name = f"{cell['task']} {cell['method']}{shots} seed {cell['seed']}"
    if "refused" in cell:
        return f"{name}: not run: {cell['refused']}"
    tests = [f"{stage} {100 * found['test_score']:.1f}" for stage, found in cell["stages"].items()]
    return f"{name}: {', '.join(tests)} ({cell['cpu_s']:.0f} s)"


def _left(work: Path, cells: Sequence[Cell]) -> str:
    """Core-minutes to go, by what cells of the same task and method have cost."""
    costs: dict[tuple[str, str], list[float]] = {}  # by task and method
    for found in read_cells(work):
        costs.setdefault((found["task"], found["method"]), []).append(found["cpu_s"])
    if not costs:
        return f"[0/{len(cells)}]"
    typical = mean(s for own in costs.values() for s in own)
    todo = [(Path(c.task).stem, c.method) for c in cells if not cell_file(work, c).exists()]
    seconds = sum(mean(costs[key]) if key in costs else typical for key in todo)
    return f"[{len(cells) - len(todo)}/{len(cells)}, about {seconds / 60:.0f} core-minutes to go]"

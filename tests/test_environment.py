"""Cores that may be used, by made-up cgroups, and what the command line sets before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mp2 import environment, limits

MASK = 16


@pytest.fixture(autouse=True)
def _mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MASK)), raising=False)


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "ascii")
    return root


V1 = "12:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, MASK),
        ({"proc/self/cgroup": "0::/\n"}, MASK),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, MASK),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),  # 1.5 cores
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}, MASK),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, MASK),
        (  # the smallest of all above, not the process' own only
            {
                "proc/self/cgroup": "0::/a.slice/b.scope\n",
                "sys/fs/cgroup/a.slice/b.scope/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/a.slice/cpu.max": "300000 100000\n",
            },
            3,
        ),
        (  # a container: the path is the host's, the mount its own
            {"proc/self/cgroup": "0::/../../pod7\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
            2,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_period_us": "50000\n",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            MASK,
        ),
        (  # both at once, as systemd's hybrid layout has it
            {
                "proc/self/cgroup": V1 + "0::/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "700000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/unified/x/cpu.max": "max 100000\n",
            },
            7,
        ),
    ],
)
def test_cores_are_the_fewest_of_mask_and_quotas(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    assert limits.usable_cores(system(tmp_path, files)) == expected


def test_this_machines_cores_are_at_most_the_mask() -> None:
    assert 1 <= limits.usable_cores() <= MASK


@pytest.fixture
def before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")


@pytest.mark.usefixtures("before_torch")
@pytest.mark.parametrize(
    ("given", "cores", "expected"),
    [
        ({}, MASK, {"GOMP_SPINCOUNT": str(environment.SPIN_COUNT)}),
        ({}, 3, {"GOMP_SPINCOUNT": str(environment.SPIN_COUNT), "OMP_NUM_THREADS": "3"}),
        (
            {"OMP_NUM_THREADS": "9"},
            3,
            {"GOMP_SPINCOUNT": str(environment.SPIN_COUNT), "OMP_NUM_THREADS": "9"},
        ),
        ({"GOMP_SPINCOUNT": "7"}, MASK, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, MASK, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_what_the_user_set_stays(given: dict[str, str], cores: int, expected: dict[str, str]) -> None:
    environment.prepare(given, cores=cores)
    assert given == expected


def test_nothing_is_set_that_torch_would_not_see() -> None:
    assert "torch" in sys.modules
    variables: dict[str, str] = {}
    environment.prepare(variables, cores=1)
    assert variables == {}


@pytest.mark.parametrize("way", ["-m mp2", "-c import sys; from mp2.cli import main; sys.exit(main())"])
def test_torch_starts_with_it_from_the_command_line(tmp_path: Path, way: str) -> None:
    """The command that loads torch does it after the variables are set."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print('TORCH', os.environ.get('GOMP_SPINCOUNT'), file=sys.stderr)\n"
        "sys.meta_path.insert(0, Finder())\n",
        "ascii",
    )
    paths = [str(tmp_path), str(Path(environment.__file__).parents[1])]
    variables = {name: x for name, x in os.environ.items() if name not in environment.VARIABLES}
    done = subprocess.run(
        [sys.executable, *way.split(" ", 1), "doctor"],
        env={**variables, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert f"TORCH {environment.SPIN_COUNT}" in done.stderr
    assert "TORCH None" not in done.stderr

"""The GPU's one command, rehearsed on a CPU: what it needs, what it writes, how its steps end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.speed import gpu, gpu_reference, gpu_steps
from benchmarks.speed.gpu_reference import SCALES, make_backbone, make_prompts, make_reference

ROOT = Path(gpu.__file__).parents[2]
TINY = SCALES["tiny"]
ABSENT = (  # from a machine that has torch, triton, transformers, onnx and CPU onnxruntime, or may be
    *("cma", "nevergrad", "bayes_opt", "matplotlib", "sklearn", "scipy", "pandas", "rich", "click"),
    *("onnx", "onnxruntime", "datasets", "pyarrow", "threadpoolctl", "fastapi", "uvicorn", "tensorrt"),
)
BLOCKED = f"""
import importlib.machinery, runpy, sys
class WithoutThem(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            return None
        return super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = WithoutThem
runpy.run_module("benchmarks.speed.gpu", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = make_reference(TINY, None)
    lengths = {f"lengths_{task}": np.array([5, 9]) for task in gpu_reference.TABLE4_TASKS}
    path = tmp_path_factory.mktemp("gpu") / "tiny.npz"
    np.savez(path, **found, **lengths)  # type: ignore[arg-type]
    return path


@pytest.mark.slow
def test_all_steps_end_well_in_a_rehearsal_without_what_a_gpu_machine_may_lack(
    reference: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, "--rehearse", "--out", str(tmp_path), "--reference", str(reference)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text("utf-8").splitlines()]
    ends = {line["step"]: line["ended"] for line in lines if "ended" in line}
    assert ends == dict.fromkeys(gpu_steps.STEPS, "well")
    assert lines[-1] == {**lines[-1], "step": "end", "failed": [], "rehearsal": True}

    def of(step: str) -> list[dict[str, Any]]:
        return [line for line in lines if line["step"] == step and "ended" not in line]

    parity = {line["precision"]: line for line in of("parity") if "missing" not in line}
    assert {"fp32", "fp16", "bf16"} <= set(parity)
    assert all(max(line["error"]) <= line["allowed"] < max(line["spread"]) for line in parity.values())
    stage_two = [line for line in of("table4") if "search" in line]
    assert {line["task"] for line in stage_two} == set(gpu_reference.TABLE4_TASKS)
    for line in stage_two:
        assert line["search"].startswith("random steps: cma is not here")
        assert line["evaluations"] == TINY.n_layers * TINY.generations * TINY.population
        assert line["evaluation_ms"] > 0
    rivals = [line["rival"] for line in of("table4") if "rival" in line]
    assert rivals == 2 * [f"{rival}, fp16" for rival in ("plain loop", "C", "B", "A")]
    (parts, *_) = [line["parts_ms"] for line in of("profile") if "parts_ms" in line]
    assert parts["layer"] > 0
    assert any("kernel" in line for line in of("profile"))
    assert {"as it is", "fused activation"} <= {line["flags"] for line in of("flags")}
    assert {line["runs"] for line in of("mini")} == {"one", "five by turns", "five together"}
    assert all(line["same_bits"] for line in of("mini"))


def test_the_steps_fit_seven_minutes() -> None:
    assert sum(seconds for seconds, _ in gpu_steps.STEPS.values()) <= 7 * 60


def test_what_lies_beside_the_script_is_of_the_full_scale_and_shows_more_than_rounding() -> None:
    scale = SCALES["full"]
    with np.load(gpu_reference.REFERENCE) as file:
        found = dict(file)
    assert found["candidates"].shape == (scale.n_candidates, 2, scale.intrinsic_dim)
    assert found["losses"].shape == (3, scale.n_candidates)
    spread = np.ptp(found["losses"], axis=1).min()
    for precision, share in (("fp32", 1e-4), ("fp16", 0.02), ("bf16", 0.1), ("fp8", 1)):
        assert 0 < found[f"error_{precision}"] * gpu_steps._MORE[precision] < share * spread
    for task, n in (("lcqmc", 32), ("tnews", 120)):
        assert len(found[f"lengths_{task}"]) == n
    np.testing.assert_array_equal(found["candidates"], gpu_reference.make_candidates(scale))


def test_the_first_layers_of_the_backbone_are_the_ones_that_exact_losses_were_computed_over() -> None:
    whole, first = make_backbone(TINY), make_backbone(TINY, 2)
    for name, x in first.encoder.state_dict().items():
        torch.testing.assert_close(whole.encoder.state_dict()[name], x, rtol=0, atol=0)
    prompts, fewer = make_prompts(TINY, whole), make_prompts(TINY, first)
    torch.testing.assert_close(prompts.projection[:2], fewer.projection, rtol=0, atol=0)
    torch.testing.assert_close(prompts.projection[2], fewer.projection[0], rtol=0, atol=0)
    np.testing.assert_array_equal(gpu_reference.probe(whole, prompts), gpu_reference.probe(first, fewer))


class Lines(list[dict[str, Any]]):
    """A ledger in memory."""

    step = ""

    def __call__(self, **values: Any) -> None:
        self.append({"step": self.step, **values})


@pytest.fixture
def bench(reference: Path) -> tuple[gpu_steps.Bench, Lines]:
    lines = Lines()
    return gpu_steps.Bench("cpu", TINY, reference, lines), lines


def test_parity_fails_where_losses_are_off_or_kernels_are_slow(
    bench: tuple[gpu_steps.Bench, Lines], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = bench
    monkeypatch.setattr(one, "precisions", lambda: ["fp16"])
    gpu_steps.parity(one)
    monkeypatch.setattr(one, "on_gpu", True)  # says a GPU's parity, over the kernels of a CPU
    with pytest.raises(
        AssertionError, match=r"fp16 has attention plain.*expected attention flash, steps tri"
    ):
        gpu_steps.parity(one)
    monkeypatch.setattr(one, "on_gpu", False)
    one.reference["losses"] = one.reference["losses"] + 3e-3
    with pytest.raises(AssertionError, match=r"fp32 is off by 0\.003, expected at most .*; fp16 is off by"):
        gpu_steps.parity(one)
    one.reference["probe"] = one.reference["probe"] + 1
    with pytest.raises(AssertionError, match="other random weights"):
        gpu_steps.parity(one)


def test_a_step_ends_at_its_deadline_or_with_an_error_and_the_others_go_on() -> None:
    lines, bench = Lines(), SimpleNamespace(on_gpu=False)

    def forever(bench: Any) -> None:
        try:
            while True:
                try:
                    time.sleep(0.01)
                except Exception:  # what guards against errors must not hold a deadline
                    continue
        finally:
            lines(rescued=True)

    def broken(bench: Any) -> None:
        raise RuntimeError("no such kernel")

    assert gpu.run_step("large", forever, bench, lines, 0.1)  # type: ignore[arg-type]
    assert not gpu.run_step("parity", forever, bench, lines, 0.1)  # type: ignore[arg-type]
    assert not gpu.run_step("flags", broken, bench, lines, 5)  # type: ignore[arg-type]
    assert gpu.run_step("mini", lambda bench: None, bench, lines, 5)  # type: ignore[arg-type]
    ends = [(line["step"], line["ended"]) for line in lines if "ended" in line]
    assert ends == [("large", "deadline"), ("parity", "deadline"), ("flags", "error"), ("mini", "well")]
    assert [line["error"] for line in lines if "error" in line] == ["RuntimeError: no such kernel"]
    assert sum("rescued" in line for line in lines) == 2
    time.sleep(0.15)  # no alarm is left


def test_lines_are_on_disk_at_once_and_appended(tmp_path: Path) -> None:
    for _ in range(2):
        ledger = gpu.Ledger(tmp_path / "gpu.jsonl")
        ledger.step = "parity"
        ledger(ok=True)
    lines = (tmp_path / "gpu.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["ok"] for line in lines] == [True, True]


def test_without_a_gpu_it_says_so_and_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.speed.gpu", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--step", "tests"], "no step 'tests'"), (["--reference", "none.npz"], "no file none.npz")],
)
def test_what_cannot_be_done_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err

"""Bundles: what run.py in one answers, without mp2, is what ``mp2 predict`` answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner

from mp2.backbone import Backbone, load_backbone, save_backbone
from mp2.cli import main
from mp2.engine.bundle import Bundle
from mp2.engine.folder import EngineFolder, file_sha256
from mp2.errors import FormatError, MismatchError, Mp2Error, UnknownNameError, UsageError
from mp2.export import parity as parity_module
from mp2.export import write_bundle
from mp2.export.triton import write_triton
from mp2.prompts import PromptSet, load_prompts, random_prompts, save_prompts
from mp2.runs.config import SCHEMA_VERSION, BbtConfig
from mp2.runs.predict import Predictor
from mp2.runs.tuned import TunedMeta, save_tuned
from mp2.tasks import load_card

DOCS = Path(__file__).resolve().parents[2] / "docs" / "engines.md"
REFUSED = ("mp2", "torch", "transformers", "safetensors", "onnx")
CHOICE = """task = "choice"
family = "multiple-choice reading"
type = "multiple_choice"
template = "阅读文档：{context}，问题：{question}，选项：{options}"
metric = "accuracy"
track = "extra"
version = 1
"""
EXTRACTION = """task = "finding"
family = "reading comprehension"
type = "extraction"
template = "阅读文档：{context}，问题：{question}"
metric = "f1"
track = "extra"
version = 1
"""
TEXTS = ["球队在最后一分钟进球", "这家店的菜很好吃", "戴隐形眼镜洗澡，小心角膜感染", "太差了，失望" * 60]


def make_run(
    out: Path,
    card: str,
    prompts: str | Path,
    *,
    backbone: Backbone | None = None,
    name: str = "mini",
    max_tokens: int = 200,
    seed: int = 8,
) -> Path:
    """A folder as a finished run leaves it, tuned to random numbers near the untuned prompt."""
    backbone = backbone or load_backbone(name)
    prompt_set = load_prompts(str(prompts), backbone)
    z = prompt_set.fuse(torch.ones(prompt_set.z.shape[:2])).detach()
    z += 0.05 * torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    out.mkdir(parents=True)
    text = card if "\n" in card else load_card(card).path.read_text("utf-8")
    (out / "card.toml").write_text(text, encoding="utf-8")
    task = load_card(out / "card.toml").task
    config = BbtConfig(
        task=task, backbone=name, prompts=str(prompts), seed=seed, runtime="torch", precision="fp32"
    )
    values = {"schema_version": SCHEMA_VERSION, "config": config.to_json()}
    (out / "config.json").write_text(json.dumps(values), encoding="utf-8")
    meta = TunedMeta(
        task=task,
        kind=prompt_set.kind,
        backbone=backbone.config.name,
        backbone_sha256=backbone.sha256,
        prompts=str(prompts),
        prompts_sha256=prompt_set.sha256,
        router=[],
        card=text,
        max_tokens=max_tokens,
        at="stage2",
        iteration=0,
        seed=seed,
    )
    save_tuned(out / "prompt.safetensors", z.numpy(), meta)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Deep prompts of 16 rows and of 5, shallow ones, three kinds of tasks; one backbone."""
    folder = tmp_path_factory.mktemp("runs")
    few = random_prompts(
        load_backbone("mini"), "deep", prompt_tokens=5, intrinsic_dim=6, tasks=("t",), scale=3.0
    )
    save_prompts(few, folder / "few.safetensors")
    return {
        "demo_topic": make_run(folder / "topic", "demo_topic", "mini-deep", max_tokens=100),
        "demo_sentiment": make_run(folder / "sentiment", "demo_sentiment", "mini-shallow"),
        "choice": make_run(folder / "choice", CHOICE, folder / "few.safetensors", max_tokens=80),
        "finding": make_run(folder / "finding", EXTRACTION, "mini-deep", max_tokens=60),
    }


@pytest.fixture(scope="module")
def bundle(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "b"
    write_bundle(list(runs.values()), out)
    return out


def alone(bundle: Path, lines: Sequence[dict[str, Any]], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run the bundle's own program where mp2, torch and the others cannot be imported."""
    hook = tmp_path / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {REFUSED}:\n"
        "            raise ImportError(f'{name} is not to be imported')\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(hook), "OMP_NUM_THREADS": "1"}
    check = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True, check=False
    )
    assert "torch is not to be imported" in check.stderr
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    command = [sys.executable, "-B", str(bundle / "run.py")]  # nothing of its own in the bundle
    return subprocess.run(
        command, input=text, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )


def predicted(run: Path, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    data = [json.dumps({k: v for k, v in line.items() if k != "task"}).encode() + b"\n" for line in lines]
    return list(Predictor(run).predict_lines(data, "lines"))


def mixed_lines() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for k, text in enumerate(TEXTS * 3):
        lines.append({"task": "demo_topic", "text": text})
        lines.append({"task": "demo_sentiment", "text": text})
        question = {
            "question": "他喜欢什么" * (1 + 9 * (k % 2)),
            "options": ["天气", "旅游，美食", "体育"][: 2 + k % 2],
        }
        lines.append({"task": "choice", "context": text, **question})
        lines.append({"task": "finding", "context": text, "question": "什么" * (1 + k)})
    return lines


def test_run_py_has_60_lines_and_answers_as_predict_does_tasks_mixed(
    runs: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    assert len((bundle / "run.py").read_text("utf-8").splitlines()) <= 60
    lines = mixed_lines()
    done = alone(bundle, lines, tmp_path)
    assert done.returncode == 0, done.stderr
    got = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(got) == len(lines)
    n_compared = 0
    for task, run in runs.items():
        pairs = [(line, answer) for line, answer in zip(lines, got, strict=True) if line["task"] == task]
        for expected, (_, answer) in zip(predicted(run, [line for line, _ in pairs]), pairs, strict=True):
            assert {**answer, "probability": 0} == {**expected, "probability": 0}
            assert answer["probability"] == pytest.approx(expected["probability"], abs=1e-5)
            n_compared += 1
    assert n_compared == len(lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"task": "demo_topik", "text": "x"},
            "line 1: task demo_topik, expected one of demo_topic",
        ),
        ({"task": "finding", "context": "x"}, "line 1: 'question' is missing"),
        ({"text": "x"}, "line 1: 'task' is missing"),
        ({"task": ["demo_topic"], "text": "x"}, "line 1: expected an object"),
        ({"task": "demo_topic", "text": 7}, "line 1: expected an object"),
        ([1, 2], "line 1: expected an object"),
        (
            {"task": "choice", "context": "x" * 50, "question": "y", "options": ["天" * 90, "地"]},
            "line 1: its options leave -",
        ),
    ],
)
def test_run_py_says_what_it_cannot_answer(bundle: Path, tmp_path: Path, line: Any, message: str) -> None:
    done = alone(bundle, [line], tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_row_is_what_it_is_alone_whatever_prompts_the_batch_mixes(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    session = ort.InferenceSession(bundle / "backbone.onnx")
    rng = np.random.default_rng(0)
    names = ["demo_topic", "choice", "finding"]
    shapes = {name: manifest["tasks"][name]["prompt_length"] for name in names}
    assert sorted(shapes.values()) == [5, 16, 16]
    ids, length = rng.integers(5, 500, (3, 11)), np.array([11, 7, 9])
    mask = (np.arange(11) < length[:, None]).astype(np.int64)
    rows = []
    from safetensors.numpy import load_file

    for name in names:
        rows.append(load_file(bundle / manifest["tasks"][name]["tensors"]))
    m = np.array([row["prompt_keys"].shape[2] for row in rows])

    def feeds(which: Sequence[int]) -> dict[str, Any]:
        most = max(m[k] for k in which)
        fed: dict[str, Any] = {
            "segments": np.array([[[1, 4]]] * len(which)),
            "input_ids": ids[which],
            "attention_mask": mask[which],
            "prompt_length": m[which],
        }
        for name in rows[0]:
            parts = [rows[k][name] for k in which]
            if name.startswith("prompt"):
                parts = [np.pad(x, ((0, 0), (0, 0), (0, most - x.shape[2]), (0, 0))) for x in parts]
            fed[name] = np.stack(parts)
        return fed

    outputs = ["start_logits", "end_logits", "hidden", "pooled"]
    together = dict(zip(outputs, session.run(outputs, feeds([0, 1, 2])), strict=True))
    for k in range(3):
        single = dict(zip(outputs, session.run(outputs, feeds([k])), strict=True))
        for name in outputs:
            real = slice(None) if name == "pooled" else slice(length[k])
            np.testing.assert_allclose(together[name][k][real], single[name][0][real], atol=1e-5)


@pytest.mark.parametrize("bad", [0, 1])
def test_windows_whose_scores_are_no_numbers_give_no_probability(bad: int) -> None:
    from mp2.export.bundle_files.reading import Row, answer

    task = {"type": "extraction", "max_answer_tokens": 8, "unanswerable": False, "temperature": 1.0}
    row = Row(np.arange(5), np.array([[1, 3]]), "今天好", [(0, 1), (1, 2), (2, 3)])
    found = [{name: np.arange(5.0) for name in ("start_logits", "end_logits")} for _ in range(2)]
    assert np.isfinite(answer(task, {}, [row, row], found)["probability"])
    found[bad]["end_logits"][2] = np.nan
    assert np.isnan(answer(task, {}, [row, row], found)["probability"])


def test_the_manifest_has_interface_hashes_and_tasks(bundle: Path, runs: dict[str, Path]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert all(manifest["files"][name] == file_sha256(bundle / name) for name in manifest["files"])
    assert list(manifest["tasks"]) == list(runs)
    for graph, sides in manifest["graphs"].items():
        session = ort.InferenceSession(bundle / graph)
        for side, infos in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            assert list(sides[side]) == [info.name for info in infos]
            assert [x["shape"] for x in sides[side].values()] == [info.shape for info in infos]
    assert manifest["graphs"]["backbone.onnx"]["inputs"]["prompt_keys"] == {
        "dtype": "float32",
        "shape": ["P", 6, 4, "m", 64],
    }


def test_readme_and_docs_name_every_input_and_output(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    readme, docs = (bundle / "README.md").read_text("utf-8"), DOCS.read_text("utf-8")
    assert "$" not in readme
    for graph, sides in manifest["graphs"].items():
        assert f"`{graph}`" in readme and f"`{graph}`" in docs  # noqa: PT018
        for tensors in sides.values():
            for name, tensor in tensors.items():
                row = re.search(rf"^\| `{name}` \| ([^|]*) \|", docs, re.MULTILINE)
                assert row, f"{name} has no row in docs/engines.md"
                sizes = {"L": 6, "h": 4, "d_h": 64, "H": 256, "L + 1": 7}
                parts = re.fullmatch(r"(\w+) \[(.*)\]", row[1])
                assert parts, row[1]
                shape = [sizes.get(x, int(x) if x.isdigit() else x) for x in parts[2].split(", ")]
                assert (parts[1], shape) == (tensor["dtype"], tensor["shape"]), name
                assert f"| `{name}` | {tensor['dtype']} |" in readme


def test_the_example_in_the_docs_runs(bundle: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    code = re.search(r"```python\n(# a bundle by hand.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    assert code
    (tmp_path / "bundle").symlink_to(bundle)
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    label, probability = done.stdout.split()
    (expected,) = predicted(runs["demo_topic"], [{"text": "球队在最后一分钟进球"}])
    assert label == expected["label"]
    assert float(probability) == pytest.approx(expected["probability"], abs=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precisions_have_float32_outside_and_close_answers(
    runs: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    manifest = write_bundle([runs["demo_topic"]], tmp_path / "b", precision=precision)
    assert manifest["precision"] == precision
    sides = manifest["graphs"]["backbone.onnx"]
    assert {x["dtype"] for side in sides.values() for x in side.values()} == {"int64", "float32"}
    if precision == "bf16":  # onnxruntime has no such kernels for CPUs; the graph is compared when written
        return
    lines = [line for line in mixed_lines() if line["task"] == "demo_topic"]
    got = [json.loads(line) for line in alone(tmp_path / "b", lines, tmp_path).stdout.splitlines()]
    for answer, expected in zip(got, predicted(runs["demo_topic"], lines), strict=True):
        assert answer["probability"] == pytest.approx(expected["probability"], abs=0.02)


def test_a_triton_repository_has_batch_first_inputs_and_shares_the_weights(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "b"
    command = ["export", "--run", *map(str, runs.values()), "--out", str(out), "--triton"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "backbone, backbone_inline (written, not run on a Triton server)" in result.output
    models = out / "triton"
    assert {path.name for path in models.iterdir()} == {"backbone", "backbone_inline"}
    model = models / "backbone" / "1" / "model.onnx"
    inputs = {
        info.name: info.shape for info in ort.InferenceSession(model).get_inputs()
    }  # its weights are there
    assert os.path.samefile(models / "backbone" / "1" / "embed.bin", out / "embed.bin")
    config = (models / "backbone" / "config.pbtxt").read_text()
    found = dict(re.findall(r'name: "(\w+)" data_type: \w+ dims: (\[ [^]]* \])', config))
    assert found["prompt_length"] == "[ 1 ]"
    assert "dims: [ 1 ] reshape { shape: [ ] }" in config
    assert found["prompt_keys"] == "[ 6, 4, -1, 64 ]"
    assert found["input_ids"] == found["start_logits"] == "[ -1 ]"
    assert set(inputs) <= set(found)
    assert all(shape[0] in ("N", "P") for shape in inputs.values())
    assert "max_batch_size: 32" in config
    assert "dynamic_batching" in config


def test_triton_reads_the_configuration(runs: dict[str, Path], tmp_path: Path) -> None:
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")

    write_bundle([runs["demo_topic"], runs["demo_sentiment"]], tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    for folder in write_triton(bundle, {"backbone.onnx": b"a plan"}):
        config = text_format.Parse((folder / "config.pbtxt").read_text(), messages.ModelConfig())
        assert config.name == folder.name
        assert config.backend == ("tensorrt" if folder.name.endswith("tensorrt") else "onnxruntime")
        assert config.HasField("dynamic_batching")
        shapes = {x.name: list(x.dims) for x in (*config.input, *config.output)}
        assert shapes["pooled"] == [-1, 7, 256]
    assert (tmp_path / "b" / "triton" / "backbone_tensorrt" / "1" / "model.plan").read_bytes() == b"a plan"


def test_a_difference_from_torch_leaves_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity_module.WHOLE_TOLERANCE, "fp32", 0.0)
    with pytest.raises(
        Mp2Error, match=r"of backbone\.onnx in fp32 differ from torch, first 'backbone.*nothing was"
    ):
        write_bundle([runs["demo_topic"]], tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_runs_of_one_task_are_told_apart_by_their_seeds(runs: dict[str, Path], tmp_path: Path) -> None:
    twin = make_run(tmp_path / "twin", "demo_topic", "mini-deep", seed=13)
    manifest = write_bundle([runs["demo_topic"], twin, runs["choice"]], tmp_path / "b")
    assert list(manifest["tasks"]) == ["demo_topic-seed8", "demo_topic-seed13", "choice"]
    with pytest.raises(UsageError, match="are both runs of task 'demo_topic' with seed 13: give one of them"):
        write_bundle([twin, twin], tmp_path / "c")


def test_runs_that_do_not_fit_are_refused(
    runs: dict[str, Path], tiny_backbone: Backbone, tmp_path: Path
) -> None:
    save_backbone(tiny_backbone, tmp_path / "tiny")
    prompts = random_prompts(tiny_backbone, "deep", prompt_tokens=4, intrinsic_dim=6, tasks=("t",))
    save_prompts(prompts, tmp_path / "p.safetensors")
    other = make_run(
        tmp_path / "other",
        CHOICE,
        tmp_path / "p.safetensors",
        backbone=tiny_backbone,
        name=str(tmp_path / "tiny"),
        max_tokens=60,
    )
    with pytest.raises(MismatchError, match=r"other was tuned on backbone 'tiny' .* expected 'mini'"):
        write_bundle([runs["demo_topic"], other], tmp_path / "b")
    inline = make_inline(tmp_path, prompts, tiny_backbone)
    with pytest.raises(UsageError, match="were trained with inline injection"):
        write_bundle([inline], tmp_path / "b")
    with pytest.raises(UnknownNameError, match="unknown precision 'fp8'"):
        write_bundle([other], tmp_path / "b", precision="fp8")
    (other / "prompt.safetensors").unlink()
    with pytest.raises(FormatError, match=r"the run has not ended, or lost it.*mp2 bbt --resume"):
        write_bundle([other], tmp_path / "b")
    with pytest.raises(UsageError, match="there is no folder"):
        write_bundle([tmp_path / "nowhere"], tmp_path / "b")
    assert not (tmp_path / "b").exists()


def make_inline(tmp_path: Path, prompts: PromptSet, backbone: Backbone) -> Path:
    meta = replace(prompts.meta, injection="inline")
    save_prompts(replace(prompts, meta=meta), tmp_path / "inline.safetensors")
    return make_run(
        tmp_path / "inline",
        CHOICE,
        tmp_path / "inline.safetensors",
        backbone=backbone,
        name=str(tmp_path / "tiny"),
        max_tokens=60,
    )


def test_the_command_takes_many_runs_and_replaces_its_own_folder(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    out = str(tmp_path / "b")
    command = ["export", "--run", str(runs["demo_topic"]), str(runs["choice"]), "--out", out]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "DIFFERS" not in result.output
    assert "2 task(s) on 'mini'" in result.output
    result = CliRunner().invoke(main, [*command, "--json"])
    assert list(json.loads(result.stdout)["manifest"]["tasks"]) == ["demo_topic", "choice"]
    with pytest.raises(FormatError, match="a bundle of 'mp2 export --run', expected an engine folder"):
        EngineFolder.open(tmp_path / "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "RUN", "--task", "demo_topic", "--popsize", "3"], "--task, --popsize: for an engine"),
        (["--run", "RUN", "--runtime", "tensorrt"], "pip install"),
        (["--run", "RUN", "--runtime", "onnxrutime"], "Did you mean 'onnxruntime'"),
        (["--backbone", "mini", "--triton"], "--triton is for a bundle"),
        (["RUN"], "runs are given as --run RUN"),
        ([], "give --backbone NAME for an engine folder, or --run RUN for a bundle"),
        (["--run", "nowhere"], "there is no folder nowhere"),
        (["--run", "RUN", "--precision", "int8"], "unknown precision 'int8'"),
    ],
)
def test_wrong_commands_exit_2(
    runs: dict[str, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    arguments = [str(runs["demo_topic"]) if a == "RUN" else a for a in arguments]
    result = CliRunner().invoke(main, ["export", "--out", str(tmp_path / "b"), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "b").exists()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    found: np.ndarray = x - np.logaddexp.reduce(x)
    return found


def test_the_readmes_recipe_for_extraction_gives_what_predict_answers(
    runs: dict[str, Path], bundle: Path
) -> None:
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    card = Bundle.open(bundle).card("finding")
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    session = ort.InferenceSession(bundle / card["graph"])
    tensors = load_file(bundle / "tasks" / "finding.safetensors")
    lines = [
        {"context": "球队在最后一分钟进球，全场欢呼。" * 5, "question": "什么时候进球"},
        {"context": "这家店的菜很好吃", "question": "什么好吃"},
    ]
    for line, expected in zip(lines, predicted(runs["finding"], lines), strict=True):
        question = tokenizer.encode(line["question"], add_special_tokens=False).ids
        context = tokenizer.encode(line["context"], add_special_tokens=False)
        size = card["room"] - len(question)
        step = size - min(card["max_answer_tokens"], size // 2)
        n = len(context.ids)
        starts = [0] if n <= size else [*range(0, n - size, step), n - size]
        best = (-np.inf, "")
        for first in starts:
            ids, at = list(card["before"]), 0
            for part in card["parts"]:
                ids += part["ids"]
                if part["field"] == "context":
                    at, window = len(ids), context.ids[first : first + size]
                    ids += window
                elif part["field"]:
                    ids += question
            row = np.array([ids + card["after"]])
            feeds = {name: x[None] for name, x in tensors.items()} | {
                "prompt_length": [card["prompt_length"]]
            }
            feeds |= {"input_ids": row, "attention_mask": np.ones_like(row), "segments": [[[0, 0]]]}
            start, end = session.run(["start_logits", "end_logits"], feeds)
            start, end = log_softmax(start[0]), log_softmax(end[0])
            for i in range(len(window)):
                for j in range(i, min(i + card["max_answer_tokens"], len(window))):
                    text = line["context"][context.offsets[first + i][0] : context.offsets[first + j][1]]
                    best = max(best, (float(start[at + i] + end[at + j]), text))
        assert len(starts) == (3 if line is lines[0] else 1)
        assert best[1] == expected["answer"]
        assert np.exp(best[0]) == pytest.approx(expected["probability"], abs=1e-5)

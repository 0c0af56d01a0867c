"""Bundles of strangers, whose hashes fit: what the server would fail on later is refused when it starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import mp2
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from mp2.engine.folder import MANIFEST, file_sha256
from mp2.errors import FormatError
from mp2.serve.model import ServedBundle

TENSORS, CARD = "tasks/demo_topic.safetensors", "tasks/demo_topic.json"
Change = Callable[[Path], str]


def other_graph(**inputs: tuple[int, list[str]]) -> Change:
    """A graph with these inputs and an output."""

    def change(bundle: Path) -> str:
        given = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
        name, (kind, shape) = next(iter(inputs.items()))
        out = helper.make_tensor_value_info("y", kind, shape)
        graph = helper.make_graph([helper.make_node("Identity", [name], ["y"])], "g", given, [out])
        model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
        (bundle / "backbone.onnx").write_bytes(model.SerializeToString())
        return "backbone.onnx"

    return change


def other_tensors(**changed: Any) -> Change:
    """Tensors of a task, some of them others, or gone (None)."""

    def change(bundle: Path) -> str:
        own = {**load_file(bundle / TENSORS), **changed}
        save_file({name: x for name, x in own.items() if x is not None}, bundle / TENSORS)
        return TENSORS

    return change


def other_head(bundle: Path) -> str:
    card = json.loads((bundle / CARD).read_text("utf-8"))
    (bundle / CARD).write_text(json.dumps({**card, "head": "mlm", "mask": 103}), "utf-8")
    return CARD


INT64 = TensorProto.INT64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_graph(x=(TensorProto.FLOAT16, ["N"])), r"backbone.onnx: 'x' is tensor\(float16\), expected"),
        (other_graph(x=(INT64, ["N"])), r"input 'input_ids' has shape None, expected \['N', 'T'\]"),
        (other_graph(input_ids=(INT64, ["N", "U"])), r"has shape \['N', 'U'\], expected \['N', 'T'\]"),
        (other_tensors(span_bias=None), "'demo_topic' has no 'span_bias', which its graph takes"),
        (
            other_tensors(span_bias=np.zeros(3, np.float32)),
            r"'span_bias' of shape \[3\], its graph takes \[2\]",
        ),
        (other_tensors(more=np.zeros(3, np.float32)), r"'more' of shape \[3\], its graph takes \[\]"),
        (other_head, "reads 'word_log_probs', which its graph does not give"),
    ],
)
def test_a_graph_or_a_task_that_does_not_fit_is_refused(
    bundle: Path, tmp_path: Path, change: Change, message: str
) -> None:
    own = shutil.copytree(bundle, tmp_path / "bundle")
    name = change(own)
    manifest = json.loads((own / MANIFEST).read_text("utf-8"))
    manifest["files"][name] = file_sha256(own / name)
    (own / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(FormatError, match=message):
        ServedBundle(own)
    done = mp2("serve", "--bundle", own)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1), done.stderr

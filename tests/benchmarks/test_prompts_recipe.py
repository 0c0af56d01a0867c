"""recipes/prompts.sh, the script itself, at 1/1000 of its steps over a toy backbone, tasks and text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_words import tiny_vocab
from training.toy_tasks import lively_backbone

from mp2.backbone import load_backbone, save_backbone
from mp2.prompts import load_prompts

ROOT = Path(__file__).resolve().parents[2]
WORDS = [c for c in tiny_vocab() if len(c) == 1 and "\u4e00" <= c <= "\u9fff"]
OPTIONS = "--batch-size 4 --max-tokens 80 --dev-limit 4 --threads 1"
SCALE = 1000


def write_world(root: Path) -> None:
    """A backbone, a task under a name of the package's cards, and text."""
    rng = np.random.default_rng(0)
    save_backbone(lively_backbone(), root / "backbone")
    for split, n in (("train", 40), ("dev", 8)):
        lines = [
            json.dumps(
                {"text": "".join(rng.choice(WORDS, 8)), "label": ("负面", "正面")[i % 2]}, ensure_ascii=False
            )
            for i in range(n)
        ]
        (root / "data" / "waimai").mkdir(parents=True, exist_ok=True)
        (root / "data" / "waimai" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    documents = ["".join("".join(rng.choice(WORDS, 10)) + "。" for _ in range(4)) for _ in range(8)]
    (root / "corpus").mkdir()
    (root / "corpus" / "text.txt").write_text("\n\n".join(documents), "utf-8")


@pytest.mark.slow
def test_the_recipe_makes_every_prompt_from_an_empty_folder(tmp_path: Path) -> None:
    write_world(tmp_path)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PRETRAIN_OPTIONS": OPTIONS,
        "MODULAR_OPTIONS": "--modules 4 --intrinsic-dim 8",
        "PROMPT_TOKENS": "3",
    }
    words = ["backbone", "data", "corpus", "made"]
    done = subprocess.run(
        ["bash", ROOT / "recipes" / "prompts.sh", *(tmp_path / word for word in words), str(SCALE)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    backbone = load_backbone(tmp_path / "backbone")
    found = {p.stem: load_prompts(p, backbone) for p in (tmp_path / "made" / "float16").glob("*")}
    assert set(found) == {"deep", "shallow", "deep-one-rate", "shallow-two-rates", "spot", "ppt", "head"}
    for name in ("spot", "ppt", "head"):
        assert found[name].meta.is_single
        assert found[name].meta.provenance["method"] == name

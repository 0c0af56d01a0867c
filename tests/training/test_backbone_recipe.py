"""recipes/backbone.sh, the script itself, on a toy corpus and with a toy encoder."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from warm_programs import run_script

from mp2.backbone import load_backbone
from training.toy_mlm import SENTENCES, losses

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--layers",
    "1",
    "--hidden",
    "16",
    "--heads",
    "2",
    "--length",
    "16",
    "--max-positions",
    "32",
    "--batch-size",
    "8",
    "--no-compile",
]


@pytest.mark.slow
def test_the_recipe_splits_trains_and_ships_a_decayed_branch(warm: dict[str, str], tmp_path: Path) -> None:
    def recipe(*words: str | Path) -> None:
        run_script(warm, ROOT / "recipes" / "backbone.sh", *words, cwd=tmp_path)

    source, work = tmp_path / "source", tmp_path / "work"
    source.mkdir()
    rng = np.random.default_rng(0)
    documents = ["\n".join(rng.choice(SENTENCES, 2)) for _ in range(1001)]
    for name, part in (("a", documents[:600]), ("b", documents[600:])):
        with lzma.open(source / f"{name}.txt.xz", "wt", encoding="utf-8") as file:
            file.write("\n\n".join(part) + "\n")
    recipe("split", source, work)
    held_out = (work / "held_out" / "text.txt").read_text("utf-8").split("\n\n")
    assert held_out == [documents[499], documents[999], ""]
    trained = (work / "corpus" / "text.txt").read_text("utf-8").split("\n\n")
    assert trained == [*documents[:499], *documents[500:999], documents[1000], ""]

    recipe("train", work, *TINY, "--steps", "20")
    before = (work / "trunk" / "mlm_checkpoint.safetensors").read_bytes()
    recipe("ship", work, "shipped", *TINY)
    assert (work / "trunk" / "mlm_checkpoint.safetensors").read_bytes() == before
    assert len(losses(work / "shipped")) == 22
    assert losses(work / "shipped")[:20] == losses(work / "trunk")
    config = json.loads((work / "shipped" / "mlm_config.json").read_text())
    assert (config["decay_steps"], config["contrastive"], config["masking"]) == (2, 0.1, "mixed")
    backbone = load_backbone(work / "shipped-float16")
    assert backbone.config.n_layers == 1
    halves = (work / f"shipped{suffix}" / "model.safetensors" for suffix in ("-float16", ""))
    small, whole = (path.stat().st_size for path in halves)
    assert small < 0.6 * whole

"""recipes/ship.sh and recipes/mini.sh, from empty folders at 1/1000 of their steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from recipe_world import ROOT, write_corpus, write_upstream
from warm_programs import run_script

from mp2.backbone import load_backbone
from mp2.prompts import load_prompts
from mp2.tasks import load_card

TINY = "--layers 2 --hidden 32 --heads 2 --batch-size 8 --vocab-size 400 --no-compile"


@pytest.mark.slow
def test_everything_that_ships_is_made_by_one_script(warm: dict[str, str], tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 600, ["waimai", "bq"])
    write_upstream(tmp_path / "data", ["waimai", "bq", "cote_mfw", "ccpm"])
    given = [tmp_path / name for name in ("corpus", "data", "work")]
    options = {
        "BACKBONE_OPTIONS": TINY,
        "PRETRAIN_OPTIONS": "--batch-size 4 --max-tokens 128 --dev-limit 4 --threads 1 --schedule linear",
        "TASKS": "waimai bq cote_mfw",
    }
    words = [ROOT / "recipes" / "ship.sh", *given, "1000"]
    said = run_script(warm, *words, cwd=tmp_path, **options)
    backbone = load_backbone(tmp_path / "work" / "shipped" / "backbone")
    assert backbone.mlm_head is not None
    lengths = {}
    for name in ("trunk", "long", "decayed"):
        config = json.loads((tmp_path / "work" / name / "mlm_config.json").read_text())
        lengths[name] = (config["length"], config["steps"], config["decay_steps"])
    assert lengths == {"trunk": (128, 40, 0), "long": (512, 42, 0), "decayed": (512, 46, 4)}
    for kind in ("deep", "shallow"):
        prompts = load_prompts(tmp_path / "work" / "shipped" / "prompts" / f"{kind}.safetensors", backbone)
        assert (prompts.kind, prompts.meta.prompt_tokens, prompts.meta.intrinsic_dim) == (kind, 32, 64)
        assert set(prompts.meta.tasks) == {"waimai", "bq", "cote_mfw"}
        assert prompts.meta.router_normalisation == "sum"
    made = {f.stem: load_prompts(f, backbone) for f in (tmp_path / "work" / "prompts" / "float16").iterdir()}
    assert set(made) == {"deep", "shallow", "deep-one-rate", "shallow-two-rates", "spot", "ppt", "head"}
    for name in ("spot", "ppt", "head"):
        assert made[name].meta.is_single
        assert made[name].meta.provenance["method"] == name
    files = [f for f in (tmp_path / "work" / "shipped").glob("*/*") if f.is_file()]
    assert f"{sum(f.stat().st_size for f in files)} bytes" in said
    before = {f: f.read_bytes() for f in files}
    run_script(warm, *words, cwd=tmp_path, **options)  # started again: all is there
    assert {f: f.read_bytes() for f in files} == before


@pytest.mark.slow
def test_the_recipe_of_mini_makes_a_backbone_and_prompts(warm: dict[str, str], tmp_path: Path) -> None:
    script = (ROOT / "recipes" / "mini.sh").read_text("utf-8")
    named = re.findall(r"^(?:joint|tasks)=\(([^)]*)\)", script, re.MULTILINE)
    tasks = {task for words in named for task in words.split()}
    assert len(tasks) > 15
    write_corpus(tmp_path / "corpus", 200, sorted(tasks))
    write_upstream(tmp_path / "data", sorted(tasks))
    given = [tmp_path / name for name in ("corpus", "data", "work")]
    run_script(warm, ROOT / "recipes" / "mini.sh", *given, "1000", cwd=tmp_path)
    backbone = load_backbone(tmp_path / "work" / "mini")
    assert (backbone.config.n_layers, backbone.config.hidden) == (4, 128)
    for kind in ("deep", "shallow"):
        prompts = load_prompts(tmp_path / "work" / "prompts" / f"{kind}.safetensors", backbone)
        assert {load_card(task.removesuffix("_rotated")).task for task in prompts.meta.tasks} <= tasks

"""recipes/ship.sh and recipes/mini.sh, from empty folders at 1/1000 of their steps; conform.sh on a toy."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from recipe_world import CHARACTERS, ROOT, write_corpus, write_upstream
from tiny_words import SPECIAL
from warm_programs import run_script

from mp2.backbone import BackboneConfig, load_backbone, random_backbone, save_backbone
from mp2.prompts import load_prompts, random_prompts, save_prompts
from mp2.training.config import PretrainConfig

TINY = "--layers 2 --hidden 32 --heads 2 --batch-size 8 --vocab-size 400 --no-compile"


@pytest.mark.slow
def test_the_next_backbone_and_every_prompt_are_made_by_one_script(
    warm: dict[str, str], tmp_path: Path
) -> None:
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
def test_tables_and_figures_over_what_prompts_there_are(warm: dict[str, str], tmp_path: Path) -> None:
    """Deep and shallow prompts alone: no SPoT, PPT, head or other rates; two of the tasks."""
    write_upstream(tmp_path / "data", ["lcqmc", "bq"], ("train", "dev", "test"))
    vocabulary = [*SPECIAL, *sorted({*CHARACTERS, *"意思判别与的关系是选项不同相似"}), *"，。？：“”"]
    shape = BackboneConfig(
        name="toy",
        n_layers=2,
        hidden=16,
        n_heads=2,
        ffn=32,
        vocab_size=len(vocabulary),
        max_positions=128,
    )
    tiny_backbone = random_backbone(shape, vocabulary, seed=1)
    save_backbone(tiny_backbone, tmp_path / "backbone")
    config = {"made_by": "mp2 pretrain", "config": asdict(PretrainConfig())}
    tasks = ("bq", "afqmc", "atec", "thucnews", "tnews")
    for kind, folder in (("deep", "float16"), ("shallow", "shallow")):
        made = random_prompts(tiny_backbone, kind, n_modules=3, prompt_tokens=2, intrinsic_dim=4, tasks=tasks)
        made = replace(made, meta=replace(made.meta, provenance=config))
        name = "deep" if kind == "deep" else "prompts"
        save_prompts(made, tmp_path / "prompts" / folder / f"{name}.safetensors")
    given = [tmp_path / name for name in ("backbone", "prompts", "data", "out")]
    script = ROOT / "recipes" / "conform.sh"
    words = [script, *given, "600", "--iters", "24", "--epochs", "2", "--test-limit", "4"]
    run_script(warm, *words, "--max-tokens", "80", cwd=tmp_path, SEEDS="8")
    out = tmp_path / "out"
    pages = {page.stem: page.read_text("utf-8") for page in out.glob("*.md")}
    assert set(pages) == {"table3", "table5", "figure3", "figure4b", "figure5"}
    assert {p.stem for p in out.glob("*.png")} == {"figure3", "figure4b", "figure5_deep", "figure5_shallow"}
    for name in ("table3", "table5", "figure3", "figure4b"):
        assert "Scale: 24 iterations of black-box tuning (paper: 8,000); 2 epochs" in pages[name]
    assert "Without ppt: --prompts has no ppt prompts." in pages["table3"]
    assert "| deep | paper |" in pages["table3"]


@pytest.mark.slow
def test_everything_that_ships_is_made_by_one_script(warm: dict[str, str], tmp_path: Path) -> None:
    script = (ROOT / "recipes" / "mini.sh").read_text("utf-8")
    first, tasks = (set(x.split()) for x in re.findall(r"^(?:first|tasks)=\(([^)]*)\)", script, re.MULTILINE))
    assert len(first) == 10
    assert (
        first
        < tasks
        == set(load_prompts("mini-deep").meta.tasks)
        == set(load_prompts("mini-shallow").meta.tasks)
    )
    write_corpus(tmp_path / "corpus", 600, sorted(tasks))
    write_upstream(tmp_path / "data", sorted(tasks))
    given = [tmp_path / name for name in ("corpus", "data", "work")]
    options = {
        "BACKBONE_OPTIONS": TINY.replace("400", "1000"),
        "PRETRAIN_OPTIONS": "--batch-size 4 --dev-limit 2",
    }
    words = [ROOT / "recipes" / "mini.sh", *given, "1000"]
    run_script(warm, *words, cwd=tmp_path, **options)
    work = tmp_path / "work"
    backbone = load_backbone(work / "mini")
    assert backbone.name == "mini"
    assert backbone.mlm_head is not None
    config = json.loads((work / "decayed" / "mlm_config.json").read_text())
    assert (config["length"], config["steps"], config["decay_steps"]) == (128, 8, 2)
    for kind in ("deep", "shallow"):
        made, ships = (
            load_prompts(work / "shipped" / f"{kind}.safetensors", backbone).meta,
            load_prompts(f"mini-{kind}").meta,
        )
        names = (
            "kind",
            "tasks",
            "backbone",
            "n_modules",
            "prompt_tokens",
            "intrinsic_dim",
            "router_normalisation",
        )
        for name in names:
            assert getattr(made, name) == getattr(ships, name)
        as_run, as_made = ships.provenance["config"], made.provenance["config"]
        assert as_made["steps"] == as_run["steps"] // 1000
        assert {k for k in as_run if as_run[k] != as_made[k]} <= {
            *("steps", "batch_size", "dev_limit"),  # of this test
            *("eval_every", "checkpoint_minutes"),  # change no weights
        }
    for name in ("spot", "ppt", "head"):
        assert (
            load_prompts(work / "prompts" / name / "prompts.safetensors", backbone).meta.provenance["method"]
            == name
        )
    files = [*(work / "mini").iterdir(), *(work / "shipped").iterdir()]
    before = {f: f.read_bytes() for f in files}
    run_script(warm, *words, cwd=tmp_path, **options)  # started again: all is there
    assert {f: f.read_bytes() for f in files} == before

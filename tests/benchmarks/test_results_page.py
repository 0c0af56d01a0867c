"""docs/results.md is what benchmarks/results_page.py writes from the committed results."""

from __future__ import annotations

import re
from statistics import median

from benchmarks.results_page import (
    CARD,
    OVER_MINI,
    PAGE,
    README,
    RESULTS,
    ROOT,
    SECTIONS,
    card,
    made,
    page,
    read,
    readme,
)


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text("utf-8") == page(), "run: python -m benchmarks.results_page"


def test_the_tables_of_the_readme_and_of_the_card_are_fresh() -> None:
    text = README.read_text("utf-8")
    assert text == readme(text), "run: python -m benchmarks.results_page"
    text = CARD.read_text("utf-8")
    assert text == card(text), "run: python -m benchmarks.results_page"


def test_every_section_names_a_module_that_exists() -> None:
    for section in SECTIONS:
        (module,) = re.findall(r"python -m ([\w.]+)", section.command)
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
        assert all((RESULTS / name).is_file() for name in section.files)


def test_what_engines_md_says_of_int8_is_what_was_measured() -> None:
    (said,) = re.findall(
        r"([\d.]+) times as fast as float32 at 6 x 1024", (ROOT / "docs/engines.md").read_text("utf-8")
    )
    exact, rough = (row["stage2_ms"]["rounds"] for row in read("throughput_vnni_1024.json")["rows"])
    assert said == f"{median(a / b for a, b in zip(exact, rough, strict=True)):.1f}"


def test_what_serving_md_says_of_mixed_batches_is_what_was_measured() -> None:
    """From 16 tasks on faster than a process a task, at 64 than batches of a task: in every round."""
    text = " ".join((ROOT / "docs" / "serving.md").read_text("utf-8").split())
    assert "from 16 tasks on, a server that mixes answers more requests a second than a process" in text
    assert "with about half of their processor time, and with 64 more than one that keeps tasks apart" in text
    rows = {row["tasks"]: row for row in read("serve_load.json")["rows"]}
    slower = [(16, "a process a task"), (64, "a process a task"), (64, "a task a batch")]
    for n_tasks, other in slower:
        row = rows[n_tasks]
        assert row["mixed"]["requests_per_s"]["min"] > row[other]["requests_per_s"]["max"]
        if other == "a process a task":
            assert 0.4 < row["mixed"]["cpu_ms"]["median"] / row[other]["cpu_ms"]["median"] < 0.6


def test_results_over_an_earlier_embedded_backbone_say_so() -> None:
    assert "mini of before" in made("router_search.json")
    for name in ("own_tasks.json", "table3.json", "figure5.json", "throughput_1024.json"):
        assert "mini of before" not in made(name)
    assert all((RESULTS / f"{name}.json").is_file() for name in OVER_MINI)

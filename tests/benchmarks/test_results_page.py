"""docs/results.md is what benchmarks/results_page.py writes from the committed results."""

from __future__ import annotations

import re

from benchmarks.results_page import PAGE, RESULTS, ROOT, SECTIONS, page


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text("utf-8") == page(), "run: python -m benchmarks.results_page"


def test_every_section_names_a_module_that_exists() -> None:
    for section in SECTIONS:
        (module,) = re.findall(r"python -m ([\w.]+)", section.command)
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
        assert all((RESULTS / name).is_file() for name in section.files)

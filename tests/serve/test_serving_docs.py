"""docs/serving.md is one script and one program, and both run as they stand."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from warm_programs import run_script

from mp2.cli import main
from mp2.serve.config import ServeConfig

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_page_runs_as_it_stands(warm: dict[str, str], tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    (program,) = re.findall(r"```python\n(# with the server.*?)```", PAGE, re.S)
    (tmp_path / "program.py").write_text(program, "utf-8")
    tune = next(k for k, block in enumerate(blocks) if "--endpoint" in block)
    blocks.insert(tune, "python program.py\n")
    # a script that fails takes its server along, which would keep the pipes open
    text = "set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + "\n".join(blocks)
    first, second = free_port(), free_port()
    text = text.replace("mp2 serve --bundle bundle", f"mp2 serve --bundle bundle --port {first}")
    text = text.replace("8001", str(second)).replace("localhost:8000", f"localhost:{first}")
    (tmp_path / "program.py").write_text(program.replace("localhost:8000", f"localhost:{first}"), "utf-8")
    lines = run_script(warm, "-c", text, cwd=tmp_path).splitlines()
    assert "(1, 4)" in lines
    assert any(
        re.search(r'\{"label": "(positive|negative)", "probability": 0\.\d+\}', line) for line in lines
    )
    shown = re.search(r'^\{"error": "field.*\}$', PAGE, re.M)
    assert shown
    assert any(shown[0] in line for line in lines), "the error that the page shows"
    assert json.loads(next(iter((tmp_path / "through").glob("*/config.json"))).read_text("utf-8"))


def test_the_page_names_the_limits_that_there_are() -> None:
    options = {option for parameter in main.commands["serve"].params for option in parameter.opts}
    shown = set(re.findall(r"`(--[a-z-]+)", PAGE))
    limits = {
        "--max-body-mib",
        "--queue",
        "--timeout-s",
        "--max-batch",
        "--max-wait-ms",
        "--no-mix-tasks",
        "--host",
    }
    assert limits <= shown & options
    assert ServeConfig(bundle="").host == "127.0.0.1"

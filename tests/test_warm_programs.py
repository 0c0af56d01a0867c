"""Programs of :mod:`warm_programs` are those that a script would start."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from warm_programs import run_script

SCRIPT = """
set -euo pipefail
mp2 --version
printf 'import sys, os\\nprint(sys.argv, os.environ["COLOUR"], __name__)\\n' > program.py
cp program.py module.py
COLOUR=green python program.py a "b c"
COLOUR=blue python -m module d | tr a-z A-Z
COLOUR=red python - e < program.py
python -c 'import os, sys; print(os.path.basename(os.getcwd()), sys.argv)' f
mp2 tasks show no_such_task 2> said || echo "exit $?"
python -c 'raise KeyError(7)' 2>> said || echo "exit $?"
python -c 'import os; os.kill(os.getpid(), 9)' || echo "exit $?"
"""


def test_a_script_sees_words_streams_environment_folder_and_exit_status(
    warm: dict[str, str], tmp_path: Path
) -> None:
    said = run_script(warm, "-c", SCRIPT, cwd=tmp_path).splitlines()
    assert said[0].startswith("mp2, version")
    assert said[1] == "['program.py', 'a', 'b c'] green __main__"
    assert said[2].endswith("MODULE.PY', 'D'] BLUE __MAIN__")
    assert said[3:] == [
        "['-', 'e'] red __main__",
        f"{tmp_path.name} ['-c', 'f']",
        "exit 2",
        "exit 1",
        "exit 137",
    ]
    errors = (tmp_path / "said").read_text("utf-8")
    assert "mp2: unknown task 'no_such_task'" in errors
    assert errors.endswith("KeyError: 7\n")


def test_a_script_that_fails_is_shown(warm: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="unknown task 'tnewz'"):
        run_script(warm, "-c", "mp2 tasks show tnewz", cwd=tmp_path)


SLEEPER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 7), (signal.SIGKILL, -9)])
def test_signals_reach_the_fork(warm: dict[str, str], number: signal.Signals, status: int) -> None:
    command = ["bash", "-c", 'exec python -c "$0"', SLEEPER]
    with subprocess.Popen(command, env={**os.environ, **warm}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        fork = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(30) == status
    for _ in range(300):
        try:
            os.kill(fork, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the fork outlives the program")

"""Record the touched part of TensorRT's Python API from the real bindings; no GPU, no TensorRT libraries.

The bindings' wheels (1.3 MB each) import once the three libraries that they are linked against exist, so
stubs with the right names and entry points are compiled. Nothing is installed into the running environment.

    python tests/engine/tensorrt/record.py          # rewrites tensorrt_bindings.json beside this file
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

VERSIONS = ("10.16.1.11", "11.4.0.106")  # the newest of 10.x and of 11.x when this was written
RECORD = Path(__file__).with_name("tensorrt_bindings.json")
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_ENTRY_POINTS = (
    "createInferBuilder_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getPluginRegistry",
    "getBuilderPluginRegistry",
    "initLibNvInferPlugins",
    "getNvOnnxParserVersion",
)
_DUMP = """
import json, sys
import tensorrt_bindings as trt

def signatures(doc):
    lines = [line.strip() for line in (doc or "").splitlines()]
    marked = [line.split(". ", 1)[1] for line in lines if line[:1].isdigit() and ". " in line and "(" in line]
    short = [line.replace("tensorrt_bindings.tensorrt.", "") for line in (marked or lines[:1])]
    return [line.replace("collections.abc.Buffer", "typing_extensions.Buffer") for line in short]  # 3.12

found = {}
for name, members in json.load(sys.stdin).items():
    owner = trt
    for part in name.split("."):
        owner = getattr(owner, part, None)
    if owner is None:
        found[name] = None
        continue
    touched = {}
    for member in members:
        value = getattr(owner, member, None)
        if value is None:
            touched[member] = None
        elif isinstance(value, property):
            entry = {"kind": "property", "signatures": signatures(value.fget.__doc__)}
            touched[member] = {**entry, "set": value.fset is not None}
        elif callable(value) and not isinstance(value, type):
            touched[member] = {"kind": "method", "signatures": signatures(value.__doc__)}
        elif isinstance(value, type):
            touched[member] = {"kind": "class"}
        else:
            number = int(value) if hasattr(value, "__int__") else str(value)
            touched[member] = {"kind": "value", "value": number}
    names = sorted(member for member in dir(owner) if not member.startswith("_"))
    found[name] = {"members": names, "touched": touched}
json.dump({"version": trt.__version__, "classes": found}, sys.stdout)
"""


class CannotRecordError(Exception):
    """No compiler, or no wheel; the message says which."""


def fetch_bindings(version: str, cache: Path) -> Path:
    """Return a folder with the bindings ``version`` and stub libraries; made in ``cache`` if not there."""
    folder = cache / f"{version}-py{sys.version_info.major}{sys.version_info.minor}"
    if (folder / "done").is_file():
        return folder
    wheel = [
        f"tensorrt-cu13-bindings=={version}",
        "--no-deps",
        "--only-binary=:all:",
        "--target",
        str(folder),
    ]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--retries",
        "0",
        "--timeout",
        "15",
        "--upgrade",
    ]
    done = subprocess.run([*pip, *wheel], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise CannotRecordError(
            f"pip cannot fetch tensorrt-cu13-bindings {version}: {done.stderr.strip()[-200:]}"
        )
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _ENTRY_POINTS))
    major = version.split(".")[0]
    for library in _LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = ["cc", "-shared", "-fPIC", "-o", str(folder / name), str(source), f"-Wl,-soname,{name}"]
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CannotRecordError(f"no C compiler for the stub libraries: {error}") from error
    (folder / "done").write_text(version)
    return folder


def record(folder: Path, touched: dict[str, list[str]]) -> dict[str, object]:
    """Return the ``touched`` members (class -> members) as the bindings in ``folder`` have them."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", _DUMP],
        input=json.dumps(touched),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=environment,
    )
    result: dict[str, object] = json.loads(done.stdout)
    return result


def main() -> None:
    """Rewrite the committed record."""
    import tempfile

    sys.path.insert(0, str(Path(__file__).parent))
    from api import touched_members

    with tempfile.TemporaryDirectory() as cache:
        found = [record(fetch_bindings(version, Path(cache)), touched_members()) for version in VERSIONS]
    RECORD.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"wrote {RECORD.name}: {', '.join(VERSIONS)}")


if __name__ == "__main__":
    main()

"""The TensorRT library, if it is there and of a release this code was checked against."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from mp2.errors import MissingDependencyError

if TYPE_CHECKING:
    import tensorrt as trt

OLDEST = (10, 16)
MAJORS = (10, 11)
NOT_RUN = (
    "execution through TensorRT has not been run by the authors of this version: its calls are checked "
    "against the real Python bindings of 10.16 and 11.4, its graphs against TensorRT's operator list"
)
_HOW = "pip install 'mp2[gpu]' on a Linux machine with an NVIDIA GPU, or export without --runtime tensorrt"


def load_tensorrt() -> ModuleType:
    """Import and return ``tensorrt``; MissingDependencyError if it is not there or of an unknown release."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"a TensorRT plan needs the package 'tensorrt' ({error}); {_HOW}"
        ) from error
    check_version(str(tensorrt.__version__))
    module: ModuleType = tensorrt
    return module


def check_version(version: str) -> None:
    """Raise MissingDependencyError unless ``version`` is 10.16 or newer, of 10.x or 11.x."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST or numbers[0] not in MAJORS:
        raise MissingDependencyError(
            f"TensorRT {version} is installed, expected 10.16 or newer, up to 11.x; {_HOW}"
        )


def make_logger(module: ModuleType, errors: list[str], warn: Callable[[str], None]) -> trt.ILogger:
    """Return a logger that appends error messages to ``errors`` and gives warnings to ``warn``."""

    class Collector(module.ILogger):  # type: ignore[name-defined, misc]
        """TensorRT's messages, kept."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                errors.append(msg)
            elif severity == module.ILogger.WARNING:
                warn(f"tensorrt: {msg}")

    return Collector()

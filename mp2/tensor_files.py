"""Files of tensors that somebody gave us: opened only if they are what their name says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mp2.errors import FormatError
from mp2.text_files import check_file

FLOATS = ("F32", "F16", "BF16")
"""What weights are stored as (safetensors' names); other types are refused, not cast."""


@contextmanager
def open_safetensors(
    path: Path, framework: str = "pt", *, expected: str = "safetensors file"
) -> Iterator[Any]:
    """``safetensors.safe_open`` with errors that name the file and say what was ``expected`` there.

    Raises:
        FormatError: no such file, a git-lfs pointer, damaged.
    """
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        if "not valid UTF-8" in str(error):  # said of the path, by the readers for torch
            raise FormatError(
                "the package safetensors opens no path whose name is not UTF-8; rename it", path=path
            ) from error
        raise FormatError(f"not a {expected}: {error}", path=path) from error


def float_tensor(file: Any, name: str, path: Path) -> Any:
    """Tensor ``name`` of an open safetensors file as float32; ``FormatError`` for other types and NaN."""
    dtype = file.get_slice(name).get_dtype()
    if dtype not in FLOATS:
        raise FormatError(f"tensor '{name}' is {dtype}, expected one of {', '.join(FLOATS)}", path=path)
    tensor = file.get_tensor(name).float()
    if not tensor.isfinite().all():
        raise FormatError(f"tensor '{name}' holds NaN or infinity: a damaged file", path=path)
    return tensor

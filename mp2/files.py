"""Files that are there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to: flushed to the disk at the end, then renamed over ``path``.

    A block that ends in an exception leaves ``path`` as it was, and nothing beside it.
    """
    partial = path.with_name(path.name + ".part")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, values: Mapping[str, Any], *, indent: int = 2) -> None:
    """Write a JSON file, whole or not at all; raises ``ValueError`` for a number that is not finite."""
    write_text(path, json.dumps(values, ensure_ascii=False, indent=indent, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    with whole_file(path) as partial:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, partial, dict(metadata))

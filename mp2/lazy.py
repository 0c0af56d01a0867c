"""Names that a package offers without loading what they need before they are asked for.

The command line reads configs from packages whose other modules take seconds to import (torch, matplotlib).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def lazily(package: str, modules: Mapping[str, str], name: str) -> Any:
    """The object ``name`` of the package, imported from the module that has it; for a ``__getattr__``."""
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

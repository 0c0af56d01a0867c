"""The one place where mp2 imports onnxruntime: without its telemetry."""

from __future__ import annotations

import os
from types import ModuleType

_SWITCH = "ORT_DISABLE_TELEMETRY"


def load_onnxruntime() -> ModuleType:
    """Import and return ``onnxruntime``, with its telemetry off unless the user's environment says otherwise.

    From 1.29 on, the import itself writes a device id and a queue of events below the home folder and looks
    up where to send them; its own switch (``disable_telemetry_events``) is reached only after that. The
    variable is read when the library is loaded.
    """
    os.environ.setdefault(_SWITCH, "1")
    import onnxruntime

    if os.environ[_SWITCH] == "1":  # releases that do not know the variable, and imports before this one
        onnxruntime.disable_telemetry_events()
    module: ModuleType = onnxruntime
    return module

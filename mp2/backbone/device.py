"""A device by name."""

from __future__ import annotations

import torch

from mp2.errors import MissingDependencyError, UnknownNameError


def resolve_device(name: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:1`` -> the device.

    Raises:
        UnknownNameError: not a device's name.
        MissingDependencyError: CUDA is not available here, or has fewer devices.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnknownNameError("device", name, ["cpu", "cuda"]) from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise UnknownNameError("device", name, ["cpu", "cuda"])
    if device.type == "cuda":
        n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= n_devices:
            raise MissingDependencyError(
                f"device '{name}' is not there: torch {torch.__version__} sees {n_devices} CUDA devices; "
                "install a CUDA build of torch on a machine with a GPU, or use --device cpu"
            )
    return device

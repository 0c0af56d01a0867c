"""What Python and the C files agree on: constants, the types of every function, what a status means.

The constants are defined here alone; the compiler gets them as macros (`MACROS`), and they are part of the
compiled library's name.
"""

from __future__ import annotations

import ctypes
from typing import Any

MAX_HEAD = 128  # numbers of a head that attention holds on the stack
SPARE_ROWS = 32  # that tiles may read behind a matrix
MAX_ROW = 16384  # numbers of a row that the passes of differences hold on the stack
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2}
_NO_MEMORY, _BAD_SIZE = 1, 2  # what a function returns; 0: done
MACROS = (
    *(f"-DMP2_MAX_HEAD={MAX_HEAD}", f"-DMP2_MAX_ROW={MAX_ROW}"),
    *(f"-DMP2_{name.upper()}={number}" for name, number in ACTIVATIONS.items()),
    *(f"-DMP2_NO_MEMORY={_NO_MEMORY}", f"-DMP2_BAD_SIZE={_BAD_SIZE}"),
)


class Half(ctypes.Structure):
    """``struct half`` of dense.c: addresses of a layer's packed weights, biases and LayerNorms."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *("attention", "attention_bias", "gamma1", "beta1"),
            *("up", "up_bias", "down", "down_bias", "gamma2", "beta2"),
        )
    )


_pointer, _int, _long, _float = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_product = (_pointer,) * 3  # sums, scales of rows, scales of output channels
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "mp2_attend": (
        *(_pointer, _int, _pointer, _pointer, _int, _int),
        *(_pointer,) * 5,
        *(_long,) * 6,
        _int,
    ),
    "mp2_pack": (_pointer, _pointer, _long, _long),
    "mp2_second_half": (
        *(_pointer, _pointer, _long, ctypes.POINTER(Half), _float, _int),
        *(_pointer, _long, _long, _long, _int),
    ),
}
_PASSES: dict[str, tuple[Any, ...]] = {  # of differences.c, for each type
    "difference": (*(_pointer,) * 3, *(_long,) * 3, _int),
    "add": (*_product, _pointer, *(_long,) * 3, _int),
    "add_norm": (
        *(*_product, _pointer, _pointer, _int, _pointer, _pointer, _float),
        *(_pointer,) * 3,
        *(_long,) * 3,
        _int,
    ),
    "add_activate": (
        *(*_product, _pointer, _pointer, _int, _pointer, _pointer),
        *(_long,) * 3,
        _int,
    ),
}
FUNCTIONS |= {  # of tiles.c
    "mp2_tiles_ready": (),
    "mp2_tiles_pack": (_pointer, _pointer, _long, _long),
    "mp2_tiles_linear": (*(_pointer,) * 3, *(_long,) * 4, _int),
    "mp2_tiles_attend": (*(_pointer,) * 4, _int, _int, *(_pointer,) * 5, *(_long,) * 6, _int),
    "mp2_tiles_second_half": (
        *(_pointer, _pointer, _int),
        *(_pointer,) * 11,
        *(_float, _int, _pointer),
        *(_long,) * 4,
        _int,
    ),
}
FUNCTIONS |= {
    f"mp2_{precision}_{name}": types for precision in ("bf16", "int8") for name, types in _PASSES.items()
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give every function of ``library`` its types and the check of its status.

    A call then raises MemoryError where a thread's memory ran out, and ValueError for sizes that the C code
    does not hold. Raises AttributeError if ``library`` lacks a function.
    """
    library.mp2_panel_width.argtypes, library.mp2_panel_width.restype = (), _long
    for name, types in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype, function.errcheck = types, _int, _check
    library.mp2_tiles_ready.errcheck = lambda answer, *_: answer  # 1: yes
    return library


def _check(status: int, function: Any, arguments: tuple[object, ...]) -> int:
    if status == _NO_MEMORY:
        raise MemoryError(f"{function.__name__}: not enough memory for a thread's rows")
    if status:
        raise ValueError(f"{function.__name__}: sizes that the C kernel does not hold")
    return status

"""Compiles the Triton kernels for a GPU that need not be there, as cpt-large launches them: a line each.

python compile_kernels.py CAPABILITY
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mp2.engine.cuda import triton_steps


def compiled(kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any]) -> str:
    """Return the PTX; the rest of the compiler has run, too.

    Pointers are multiples of 16 bytes, as those of torch's allocator are.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    where = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(names) if signature[n][0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=where, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(made.asm["cubin"]) > 1000
    return str(made.asm["ptx"])


def loads(ptx: str) -> str:
    """Tell whether rows are read 16 bytes at a time or number by number."""
    return "number by number" if "ld.global.b16" in ptx else "wide loads"


def main(capability: int) -> None:
    """Compile all of them."""
    for own in ("fp16", "bf16", "fp32"):
        rows = dict.fromkeys(("x", "residual", "out"), f"*{own}")
        norm = {"weight": "*fp32", "bias": "*fp32", "n_residual": "i32", "eps": "fp32"}
        ptx = compiled(triton_steps._add_norm, capability, rows | norm, {"WIDTH": 1024, "BLOCK": 1024})
        print("add_norm", own, loads(ptx))
    for own in ("fp16", "bf16"):
        tensors = dict.fromkeys(("qkv", "keys", "values", "out"), f"*{own}")
        sizes = dict.fromkeys(("n_slots", "n_prefix"), "i32")
        blocks = {"WIDE": 64, "QUERIES": triton_steps._QUERIES, "KEYS": triton_steps._KEYS}
        ptx = compiled(
            triton_steps._attend,
            capability,
            tensors | sizes | {"tiles": "*i32", "scale": "fp32"},
            {"HEADS": 16, "SIZE": 64, "ONE_TEXT": False, "ONE_PREFIX": False, "PRECISION": "tf32"} | blocks,
        )
        print("attend", own, "on tensor cores," if "mma" in ptx else "without tensor cores,", loads(ptx))
    if capability >= 89:
        for activation in ("", "gelu", "gelu_tanh", "relu"):
            ptx = compiled(
                triton_steps._quantize,
                capability,
                {"x": "*bf16", "rows": "*fp8e4nv", "scales": "*fp32"},
                {"LARGEST": 448.0, "ACTIVATION": activation, "WIDTH": 4096, "BLOCK": 4096},
            )
            print("quantize", activation or "as it is", "e4m3x2" if "e4m3x2" in ptx else "", loads(ptx))


if __name__ == "__main__":
    main(int(sys.argv[1]))

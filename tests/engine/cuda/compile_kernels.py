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
    """Return the PTX; the rest of the compiler has run, too."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    where = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=where, attrs={})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(made.asm["cubin"]) > 1000
    return str(made.asm["ptx"])


def main(capability: int) -> None:
    """Compile all of them."""
    for own in ("fp16", "bf16", "fp32"):
        rows = dict.fromkeys(("x", "residual", "out"), f"*{own}")
        norm = {"weight": "*fp32", "bias": "*fp32", "n_residual": "i32", "eps": "fp32"}
        compiled(triton_steps._add_norm, capability, rows | norm, {"WIDTH": 1024, "BLOCK": 1024})
        print("add_norm", own)
    for own in ("fp16", "bf16"):
        tensors = dict.fromkeys(("qkv", "keys", "values", "out"), f"*{own}")
        sizes = dict.fromkeys(("row_stride", "candidate_stride", "n_slots", "n_prefix"), "i32")
        blocks = {"WIDE": 64, "QUERIES": triton_steps._QUERIES, "KEYS": triton_steps._KEYS}
        ptx = compiled(
            triton_steps._attend,
            capability,
            tensors | sizes | {"tiles": "*i32", "scale": "fp32"},
            {"HEADS": 16, "SIZE": 64, "PRECISION": "tf32"} | blocks,
        )
        print("attend", own, "on tensor cores" if "mma" in ptx else "without tensor cores")
    if capability >= 89:
        for activation in ("", "gelu", "gelu_tanh", "relu"):
            ptx = compiled(
                triton_steps._quantize,
                capability,
                {"x": "*bf16", "rows": "*fp8e4nv", "scales": "*fp32"},
                {"LARGEST": 448.0, "ACTIVATION": activation, "WIDTH": 4096, "BLOCK": 4096},
            )
            print("quantize", activation or "as it is", "cvt.rn" if "e4m3x2" in ptx else "by hand")


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""Compiles the device's kernels for GPUs that need not be here: `python compile_triton.py 75 90`, compute capabilities.

Prints registers, bytes of stack and of shared memory of each.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from moray.runtime.device import triton_kernels
from moray.runtime.device.kernels import DEQUANTIZE_TILE, constants
from moray.runtime.layout.packed import PackedSpec

_SPECS = (
    PackedSpec(64, 256, "q4", 64),
    PackedSpec(64, 256, "q3", 64, "u8"),
    PackedSpec(64, 256, "q2", 16),
    PackedSpec(64, 256, "q8", 64),
    PackedSpec(64, 256, "fp4", 32, "e8m0"),
)
_SIZES = ("matrix_at", "bias_at", "num_rows", "num_columns", "num_groups", "code_bytes", "block_bytes")


def compile_kernel(function: Any, capability: int, pointers: dict[str, str], **constexprs: Any) -> CompiledKernel:
    names = function.arg_names
    kinds = {name: pointers.get(name, "constexpr" if name in constexprs else "i32") for name in names}
    aligned: dict[Any, Any] = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in (*pointers, *_SIZES)
    }
    source = ASTSource(function, kinds, {(names.index(key),): value for key, value in constexprs.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def compile_all(capability: int, spec: PackedSpec) -> dict[str, CompiledKernel]:
    half = "*bf16" if capability >= 80 else "*fp16"
    index = dict.fromkeys(("offsets", "starts", "counts", "x_rows", "y_rows"), "*i64")
    few = {"memory": "*u8", "x": half, "y": "*fp32", **index}
    common = constants(spec)
    found = {
        name: compile_kernel(triton_kernels.matmul_few, capability, few, **common, HAS_BIAS=True, IS_SINGLE=is_single)
        for name, is_single in (("one token", True), ("few tokens", False))
    }
    whole = {"packed": "*u8", "out": half}
    found["dequantize"] = compile_kernel(triton_kernels.dequantize, capability, whole, **common, TILE=DEQUANTIZE_TILE)
    return found


def resources(kernel: CompiledKernel) -> tuple[int, int, int]:
    """Registers of a thread, bytes of stack (what did not fit registers), bytes of shared memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+).*?STACK:(\d+)", run.stdout + run.stderr)
    assert usage is not None, run
    return int(usage[1]), int(usage[2]), kernel.metadata.shared


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for spec in _SPECS:
            for name, kernel in compile_all(capability, spec).items():
                registers, stack, shared = resources(kernel)
                what = f"sm_{capability} {spec.encoding} {spec.meta}, {name}"
                print(f"{what}: {registers} registers, {stack} bytes of stack, {shared} shared")


if __name__ == "__main__":
    main()

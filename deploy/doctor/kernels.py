"""Checks of the compiled kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from moray.deploy.doctor.check import Check
from moray.deploy.doctor.child import ChildError, ask_child


def check_instruction_set() -> Iterator[Check]:
    try:
        from moray.runtime.kernels.isa import INSTRUCTION_SETS, detect_instruction_set

        chosen = detect_instruction_set()
    except ValueError as error:
        yield Check("instruction set", "problem", str(error), "unset MORAY_KERNEL, or set it to one of these")
        return
    if not os.environ.get("MORAY_KERNEL"):
        yield Check("instruction set", "ok", f"{chosen}, the best this CPU has")
        return
    del os.environ["MORAY_KERNEL"]
    try:
        best = detect_instruction_set()
    finally:
        os.environ["MORAY_KERNEL"] = chosen
    yield judge_override(chosen, best, INSTRUCTION_SETS)


def judge_override(chosen: str, best: str, from_best_to_worst: tuple[str, ...]) -> Check:
    found = f"{chosen}, set by MORAY_KERNEL; the best this CPU has is {best}"
    if chosen == best:
        return Check("instruction set", "ok", found)
    if from_best_to_worst.index(chosen) > from_best_to_worst.index(best):
        return Check("instruction set", "warning", found, "unset MORAY_KERNEL: it makes kernels slower, not better")
    return Check("instruction set", "problem", found, "unset MORAY_KERNEL: this CPU cannot run such kernels")


def check_kernels() -> Iterator[Check]:
    try:
        found = ask_child(try_kernels)
    except ChildError as error:
        remedy = "unset MORAY_KERNEL if it is set; else set it to portable, which every CPU runs, and report this"
        yield Check("kernels", "problem", str(error), remedy)
        return
    took = f"{found['instruction_set']}, {found['threads']} threads, {found['seconds']:.1f} s"
    if found["equal"]:
        yield Check("kernels", "ok", f"int8 results equal the reference bit for bit ({took})")
    else:
        remedy = "set MORAY_KERNEL=portable and report this: tokens would differ from those of other machines"
        yield Check("kernels", "problem", f"int8 results differ from the reference ({took})", remedy)


def try_kernels() -> dict[str, Any]:
    """Compare the compiled int8 kernel with its definition. Runs in a child: a wrong instruction ends it."""
    import numpy as np

    from moray.runtime.kernels import isa, ops, reference
    from moray.runtime.kernels.pool import current_pool
    from moray.runtime.layout.packed import PackedSpec, Quantized, pack_quantized

    started = perf_counter()
    random = np.random.default_rng(0)
    spec = PackedSpec(40, 256, "q4", 64)  # 40 rows: the last block of 16 is not full
    codes = random.integers(0, 16, (40, 256), dtype=np.uint8)
    scales, zeros = random.uniform(0.01, 0.1, (40, 4)), random.uniform(0, 15, (40, 4))
    packed = pack_quantized(Quantized(codes, scales.astype(np.float32), zeros.astype(np.float32)), spec)
    x_TC = random.standard_normal((5, 256), dtype=np.float32)
    y_TR = ops.linear(x_TC, packed, ops.MatrixKernel.of(spec, "int8"))
    return {
        "equal": y_TR.tobytes() == reference.matmul(x_TC, packed, spec).tobytes(),
        "instruction_set": isa.INSTRUCTION_SET,
        "threads": current_pool().num_threads,
        "seconds": perf_counter() - started,
    }

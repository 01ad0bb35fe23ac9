"""Which instruction set the kernels are compiled for."""

from __future__ import annotations

import os

import llvmlite.binding as llvm

INSTRUCTION_SETS = ("avx512vnni", "avx512", "avx2", "portable")


def detect_instruction_set() -> str:
    """The best instruction set of this CPU; MORAY_KERNEL overrides it. Raises ValueError if it names none."""
    wanted = os.environ.get("MORAY_KERNEL", "")
    if wanted:
        if wanted not in INSTRUCTION_SETS:
            raise ValueError(f"MORAY_KERNEL={wanted} is unknown, expected one of {', '.join(INSTRUCTION_SETS)}")
        return wanted
    features = llvm.get_host_cpu_features()
    if features.get("avx512vnni"):
        return "avx512vnni"
    if features.get("avx512bw"):
        return "avx512"
    return "avx2" if features.get("avx2") else "portable"


INSTRUCTION_SET = detect_instruction_set()

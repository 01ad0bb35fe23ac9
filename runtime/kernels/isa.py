"""Which instruction set the kernels are compiled for, and where their prefetches go."""

from __future__ import annotations

import os

import llvmlite.binding as llvm

PORTABLE = "portable"
INSTRUCTION_SETS = ("avx512vnni", "avx512", "avxvnni", "avx2", PORTABLE)


def detect_instruction_set() -> str:
    """The best instruction set of this CPU; MORAY_KERNEL overrides it. Raises ValueError if it names none."""
    wanted = os.environ.get("MORAY_KERNEL", "")
    if wanted:
        if wanted not in INSTRUCTION_SETS:
            raise ValueError(f"MORAY_KERNEL={wanted} is unknown, expected one of {', '.join(INSTRUCTION_SETS)}")
        return wanted
    return best_instruction_set(llvm.get_host_cpu_features())


def best_instruction_set(features: dict[str, bool]) -> str:
    """The best instruction set of a CPU with these LLVM features."""
    if not (features.get("avx2") and features.get("f16c") and features.get("fma")):
        return PORTABLE
    if features.get("avx512bw"):
        return "avx512vnni" if features.get("avx512vnni") else "avx512"
    return "avxvnni" if features.get("avxvnni") else "avx2"


def prefetch_locality(cpu: str) -> int:
    """LLVM's locality of software prefetches on a CPU of this LLVM name: 3 is into all caches, 2 all but the nearest.

    AMD's nearest cache can wait for few lines at once: asking for more of them there is slower than not asking
    (docs/measured.md, Bench). Of Intel's, 3 was measured to be better than none, 2 was not tried.
    """
    return 2 if cpu.startswith("znver") else 3


INSTRUCTION_SET = detect_instruction_set()
PREFETCH_LOCALITY = prefetch_locality(llvm.get_host_cpu_name())

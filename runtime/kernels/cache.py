"""Where compiled kernels are kept, and which of them a store needs. Does not import Numba.

The folder is named after the sources, the CPU and the instruction set, because Numba does not notice an edited
intrinsic.
"""

from __future__ import annotations

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path

import llvmlite.binding as llvm

from moray.runtime import paths
from moray.runtime.kernels.isa import INSTRUCTION_SET
from moray.runtime.layout.packed import Numerics, PackedSpec
from moray.runtime.store.manifest import Manifest


@functools.cache
def cache_folder() -> Path:
    """The folder of this version of the kernels on this CPU; made if need be."""
    cpu = f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    digest = hashlib.sha256(f"{version('numba')} {INSTRUCTION_SET} {cpu}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return paths.cache_folder(f"kernels-{digest.hexdigest()[:16]}")


def needed_kernels(manifest: Manifest) -> list[PackedSpec]:
    """One small matrix of each kind that a store has: each kind is compiled once."""
    specs = {spec for layer in manifest.layers for tensor in layer.layout.tensors if (spec := tensor.spec)}
    specs |= set(manifest.packed_trunk.values())
    specs.add(PackedSpec(16, 64, "bf16"))  # routers, if they are fused
    kinds = {PackedSpec(16, spec.group or 64, spec.encoding, spec.group, spec.meta) for spec in specs}
    return sorted(kinds, key=str)


def compiled_stamp(specs: list[PackedSpec], numerics: Numerics) -> Path:
    """A file that is there once all of these were compiled."""
    digest = hashlib.sha256(f"{specs} {numerics}".encode()).hexdigest()[:16]
    return cache_folder() / f"compiled-{digest}"

"""Compile the kernels that a store needs: ``python -m moray.runtime.kernels.compile STORE int8``.

Prints ``done total what`` before each step, and leaves a stamp beside the compiled kernels (cache.py).
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from moray.runtime.kernels.cache import compiled_stamp, needed_kernels
from moray.runtime.layout.packed import Numerics
from moray.runtime.store.store import Store

# What Python calls is compiled when its module is imported (setup.py). In the order in which they use each other.
_MODULES = {
    "activation": "activations",
    "programs": "products",
    "moe": "experts",
    "attention": "attention",
    "attention_prompt": "attention of prompts",
    "attention_batch": "attention of batches",
    "lookup": "embeddings",
    "routed": "routing",
    "layers": "layers",
}


def compile_kernels(store: Path, numerics: Numerics) -> None:
    """Compile what every store uses; then compile and check each kind of matrix that this one has."""
    with Store.open(store) as opened:
        specs = needed_kernels(opened.manifest)
    total = len(_MODULES) + len(specs)
    for done, (module, what) in enumerate(_MODULES.items()):
        print(done, total, what, flush=True)
        import_module(f"moray.runtime.kernels.{module}")
    from moray.runtime.kernels.ops import MatrixKernel

    for done, spec in enumerate(specs, len(_MODULES)):
        print(done, total, spec.encoding, flush=True)
        MatrixKernel.of(spec, numerics)
    compiled_stamp(specs, numerics).touch()


if __name__ == "__main__":
    compile_kernels(Path(sys.argv[1]), "float" if sys.argv[2] == "float" else "int8")

"""Importing torch and transformers without what no model needs here: half of what an engine's process takes for it.

- transformers' caches import hqq, and its modules for training torch.distributed's tensors; both ask first whether
  those are there, in ``transformers.utils.import_utils``. Here they are not.
- Some of its functions are exempted from torch's compiler, which is imported for that, and with it sympy and networkx.
  Nothing is compiled here, so they are left as they are.
- It reads all of its sources, thousands of files, for the names that each has. What it found is kept on disk.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from moray.runtime import paths

_MODULE = "transformers.utils.import_utils"
_COMPILER = "torch._dynamo"
_INDEX = f"{_COMPILER}._trace_wrapped_higher_order_op"
_ABSENT = ("is_hqq_available", "is_torch_distributed_available")  # as transformers is told in this process

Structure = Callable[[Any, str | None], Any]


def import_lean() -> None:
    """Import both, for a process that only runs models. Does nothing in one that has imported transformers."""
    if "transformers" in sys.modules:
        return
    sys.meta_path.insert(0, _Finder())
    import torch  # noqa: F401  # by itself, it needs no stand-in

    with _without_compiler():
        import transformers.generation.utils
        import transformers.modeling_utils  # noqa: F401


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Stands in for torch's compiler while others decorate functions with it."""
    if _COMPILER in sys.modules:
        yield
        return
    stand_in, index = ModuleType(_COMPILER), ModuleType(_INDEX)
    stand_in.__getattr__ = _decorator  # type: ignore[method-assign]
    index.TransformGetItemToIndex = _Index  # type: ignore[attr-defined]
    sys.modules |= {_COMPILER: stand_in, _INDEX: index}
    try:
        yield
    finally:
        del sys.modules[_COMPILER], sys.modules[_INDEX]


def _decorator(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _undecorated


def _undecorated(function: Any = None, *_: object, **__: object) -> Any:
    return (lambda later: later) if function is None else function


class _Index:
    """torch's, which masks are made with in a few models, imported when it is used."""

    def __new__(cls) -> Any:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        return TransformGetItemToIndex()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds that one module, and changes it before anybody has taken a name from it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for name in _ABSENT:
            if hasattr(module, name):
                setattr(module, name, _is_absent)
        module.define_import_structure = _kept(module.define_import_structure)  # type: ignore[attr-defined]


def _is_absent(*_: object) -> bool:
    return False


def _kept(define: Structure) -> Structure:
    """transformers' ``define_import_structure``, from this user's cache where it was asked the same before."""

    def kept(module_path: Any, prefix: str | None = None) -> Any:
        folder = Path(module_path).resolve()
        folder = folder.parent if folder.suffix == ".py" else folder
        if folder.name != "models":  # of one family: a few files
            return define(module_path, prefix)
        kind = f"{version('transformers')}-{folder.stat().st_mtime_ns}-{prefix or ''}"
        file = paths.cache_folder("transformers") / f"names-{kind}.pickle"
        try:
            return pickle.loads(file.read_bytes())
        except (OSError, ValueError, EOFError, pickle.UnpicklingError):
            structure = define(module_path, prefix)
        draft = file.with_suffix(f".{os.getpid()}")
        draft.write_bytes(pickle.dumps(structure))
        draft.replace(file)
        return structure

    return kept

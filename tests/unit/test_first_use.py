from __future__ import annotations

import io
import pkgutil
import subprocess
from importlib import import_module

import pytest
from rich.console import Console

from moray.deploy.config import demo_store
from moray.deploy.first_use import compile_for
from moray.runtime import kernels
from moray.runtime.kernels.cache import compiled_stamp, needed_kernels
from moray.runtime.store.store import Store


def test_a_stores_kernels_are_compiled_once_with_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(demo_store()) as store:
        stamp = compiled_stamp(needed_kernels(store.manifest), "int8")
    stamp.unlink(missing_ok=True)
    output = io.StringIO()
    compile_for(demo_store(), "int8", Console(file=output, force_terminal=True, width=100))
    assert stamp.exists()
    assert "Compiling kernels, once on this machine" in output.getvalue() and "layers" in output.getvalue()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    compile_for(demo_store(), "int8", Console(file=output))


def test_each_function_is_compiled_once() -> None:
    """Numba compiles again for a literal, an unsigned address or a tuple of another length, and nobody would notice."""
    counts = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        for name, function in vars(import_module(f"{kernels.__name__}.{module.name}")).items():
            cache = getattr(getattr(function, "_cache", None), "_cache_file", None)
            if cache is not None:
                counts[f"{function.__module__}.{name}"] = len(cache._load_index())
    assert max(counts.values()) == 1, {name: count for name, count in counts.items() if count > 1}

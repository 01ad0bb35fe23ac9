"""Numba's settings, made once, before any kernel is compiled, and how functions are compiled that Python calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numba
from numba import njit, types

from moray.runtime.kernels.cache import cache_folder

numba.config.CACHE_DIR = str(cache_folder())

INTS, TABLE, FLOATS = types.int64[::1], types.int64[:, ::1], types.float32[:, ::1]


def entry(arrays: str = "", **kinds: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function when its module is imported, or load it: for these types and no others.

    Its parameters are int64, but for ``arrays``, whose names are listed, which are int64 [.], and for ``kinds``.
    Functions that only others call are compiled as part of these; small ones are best inlined (``inline="always"``),
    because Numba compiles a function once for each literal that it is given.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        given = {**dict.fromkeys(arrays.split(), INTS), **kinds}
        names = list(inspect.signature(function).parameters)
        assert given.keys() <= set(names), f"{function.__name__} has no {sorted(given.keys() - set(names))}"
        return njit(tuple(given.get(name, types.int64) for name in names), nogil=True, cache=True)(function)

    return compiled

"""Numba's settings, made once, before any kernel is compiled. Import this before `numba.njit` is used."""

from __future__ import annotations

import numba

from moray.runtime.kernels.cache import cache_folder

numba.config.CACHE_DIR = str(cache_folder())

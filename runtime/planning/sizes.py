"""Sizes as people write them: ``8GiB``, ``512MB``, ``80%``."""

from __future__ import annotations

import re

from moray.runtime.errors import ConfigError

_UNITS = {
    **{"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
    **{"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40},
}
_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?) *([a-z]*|%)", re.ASCII | re.IGNORECASE)


def parse_bytes(text: str, total: int | None = None, option: str = "size") -> int:
    """Bytes in a text such as ``8GiB``, ``8GB``, ``8192MiB`` or, of ``total``, ``80%``; rounded down, at least 1.

    ``option`` names it in errors; without ``total`` there are no percentages. Raises ConfigError.
    """
    examples = "8GiB or 500MB" if total is None else "8GiB, 500MB or 80%"
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{option} is {text!r:.60}, expected a size above 0 such as {examples}")
    number, unit = float(match[1]), match[2].lower()
    if unit == "%" and total is not None:
        if number > 100:
            raise ConfigError(f"{option} is {text!r:.60}, expected at most 100%")
        size = int(total * number / 100)
    elif unit in _UNITS:
        size = int(number * _UNITS[unit])
    else:
        raise ConfigError(
            f"{option} is {text!r:.60} with the unit {unit!r:.20}, expected B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, "
            f"such as {examples}"
        )
    if size < 1:
        raise ConfigError(f"{option} is {text!r:.60}, which is no memory at all; expected a size such as {examples}")
    return size

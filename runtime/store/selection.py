"""Which experts of a store are meant: by layers, by parts, or listed in a file."""

from __future__ import annotations

import json
import re
from pathlib import Path

from moray.runtime.errors import ConfigError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.manifest import Manifest


def experts_of_layers(manifest: Manifest, text: str) -> list[ExpertKey]:
    """``text``: MoE layers as 0-3,7. Raises ConfigError."""
    layers: set[int] = set()
    for word in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < len(manifest.layers):
            raise ConfigError(
                f"--layers has {word.strip()!r:.40}, expected such as 0-3,7: of the store's MoE layers "
                f"0 to {len(manifest.layers) - 1}"
            )
        layers.update(range(first, last + 1))
    return [key for key in manifest.shards if key.layer in layers]


def experts_of_part(manifest: Manifest, text: str) -> list[ExpertKey]:
    """``text``: i/n, one of n parts of nearly equal size, each with experts of every layer. Raises ConfigError.

    As experts are dealt to n hosts (``place_evenly`` in cluster/placement.py).
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    part, num_parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= num_parts <= len(manifest.shards):
        raise ConfigError(f"--part is {text!r:.40}, expected i/n such as 1/2, with n at most {len(manifest.shards)}")
    return [key for turn, key in enumerate(sorted(manifest.shards)) if turn % num_parts == part - 1]


def experts_of_file(manifest: Manifest, path: Path) -> list[ExpertKey]:
    """A JSON list of [layer, expert]. Raises ConfigError."""
    try:
        keys = [ExpertKey(*pair) for pair in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no JSON list of [layer, expert] pairs ({error})") from error
    for key in keys:
        if key not in manifest.shards or any(type(number) is not int for number in key):
            raise ConfigError(f"{path} names [{key.layer!r:.20}, {key.expert!r:.20}], which is no expert of the store")
    return list(dict.fromkeys(keys))

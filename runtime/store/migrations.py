"""Earlier store formats, turned into the present one as they are read. `moray store repack` makes it last.

A change of what the manifest says is a new format and one entry here: from the version before it, document to
document, without reading weights. A change of bytes in shards is another layout id, and is not migrated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Document = dict[str, Any]
FORMAT_VERSION = 2

_VERSIONS = ("moray", "torch", "transformers", "hqq")


def _split_versions(document: Document) -> Document:
    """1 -> 2: what converted a store was mixed with where it comes from; and stores had no receipt."""
    source = document["source"]
    return document | {
        "source": {name: value for name, value in source.items() if name not in _VERSIONS},
        "versions": {name: source[name] for name in _VERSIONS if name in source},
    }


#: Version -> what makes the next one of it.
MIGRATIONS: dict[int, Callable[[Document], Document]] = {1: _split_versions}


def migrate(document: Document) -> Document:
    """A manifest of any version in ``MIGRATIONS``, as one of ``FORMAT_VERSION``."""
    while (version := document["format"]) != FORMAT_VERSION:
        document = MIGRATIONS[version](document) | {"format": version + 1}
    return document

"""Hub ids on the command line: ``moray convert ORG/NAME STORE`` and ``--model ORG/NAME``. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from moray.runtime.errors import ConfigError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(text: str) -> bool:
    """Whether ``text`` names a repository and nothing that is here: ORG/NAME, not ./ORG/NAME."""
    path = Path(text)
    return _HUB_ID.fullmatch(text) is not None and not path.exists() and not path.parent.is_dir()


def stay_offline(arguments: Mapping[str, Any]) -> None:
    """Unless a command names a model on a hub, no library may ask one. What the user has set stays."""
    asks = arguments.get("model") is not None or is_hub_id(str(arguments.get("checkpoint") or ""))
    if not asks:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def store_of_model(
    store: Path | None, model: str | None, revision: str | None, recipe: str, console: Console
) -> Path | None:
    """The store that ``--store`` or ``--model`` means; a model is converted the first time."""
    if model is None:
        if revision is not None:
            raise ConfigError("--revision is given without --model; it chooses a revision of a model on the hub")
        return store
    if store is not None:
        raise ConfigError("--store and --model are both given; give one of them")
    if not is_hub_id(model):
        raise ConfigError(f"--model is {model!r}, expected a hub id, ORG/NAME; a store is given with --store")
    from moray.deploy.store_commands import convert_store
    from moray.runtime.convert.hub_convert import cached_store

    def make(target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        convert_store(Path(model), target, recipe, None, console, revision=revision, stream=True)

    found = cached_store(model, recipe, revision, make)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the engine's processes need no hub
    return found

"""The profile of a store, from this user's cache or measured in a process of its own. Does not import torch."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from moray.runtime import errors, paths
from moray.runtime.errors import MorayError
from moray.runtime.planning.profile import ModelProfile, decode_profile
from moray.runtime.store.manifest import MANIFEST_NAME

_SOURCES = ("planning", "model", "model/adapters")


def profile_of(store: Path, device: Literal["cpu", "cuda"] = "cpu") -> ModelProfile:
    """The profile of an intact store on a kind of device. Seconds the first time, then a file is read.

    Raises what ``load_config`` and ``build_model`` raise.
    """
    file = paths.cache_folder("profiles") / f"{_key(store, device)}.json"
    try:
        return decode_profile(file.read_text())
    except (OSError, ValueError, KeyError, TypeError):
        text = _measure(store, device)
    profile = decode_profile(text)
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(text)
    draft.replace(file)
    return profile


def _key(store: Path, device: str) -> str:
    """Everything a profile depends on: the config, which weights are packed, and the code that runs them."""
    digest = hashlib.sha256(f"{device} {version('transformers')} {version('torch')}".encode())
    sources = [file for folder in _SOURCES for file in sorted((Path(__file__).parents[1] / folder).glob("*.py"))]
    for file in (store / "config.json", store / MANIFEST_NAME, *sources):
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:32]


def _measure(store: Path, device: str) -> str:
    command = [sys.executable, "-P", "-m", "moray.runtime.planning.measure", str(store), device]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        last = next((line for line in reversed(child.stderr.splitlines()) if line.strip()), "it said nothing")
        raise MorayError(f"the model of {store} could not be measured: its process ended with {last.strip()}")
    text = child.stdout.strip().splitlines()[-1]
    document = json.loads(text)
    if "error" in document:
        raise getattr(errors, document["error"])(document["message"])
    return text

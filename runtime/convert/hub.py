"""A model hub, as its own client (huggingface_hub) speaks to it: what a repository holds, small files, headers.

The client honours HF_ENDPOINT (mirrors), HF_HUB_OFFLINE, HF_HOME and its token. Code in repositories is neither
fetched nor run. The client's errors become ours here, and no message of ours holds a URL or a token.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from httpx2 import HTTPError
from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status, http_backoff
from huggingface_hub.utils.tqdm import tqdm

from moray.runtime.convert.checkpoint import INDEX_NAME, SINGLE_NAME, read_index_files
from moray.runtime.convert.workspace import is_copied
from moray.runtime.errors import CheckpointError, HubError

_FIRST_READ = 1 << 20  # most headers are shorter
_MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class HubFile:
    """``sha256`` is the hub's for large files, else None; ``blob`` is its name for the content."""

    name: str
    num_bytes: int
    sha256: str | None
    blob: str


@dataclass(frozen=True, slots=True)
class HubModel:
    """One commit of a repository. ``revision``: as asked for, a branch, a tag or a commit."""

    name: str
    revision: str
    commit: str
    files: dict[str, HubFile]


class QuietBar(tqdm):
    """The client's progress bar, drawing nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]


def find_model(name: str, revision: str | None) -> HubModel:
    """Ask the hub what it has. Raises HubError."""
    with explain(name, revision):
        # Retries first: model_info itself asks only once.
        url = f"{HfApi().endpoint}/api/models/{name}"
        http_backoff("GET", url, headers=build_hf_headers(), max_retries=4, timeout=30)
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=30)
    files = {}
    for entry in info.siblings or []:
        if ".." in Path(entry.rfilename).parts or Path(entry.rfilename).is_absolute():
            continue  # a name that would leave its folder
        sha256 = entry.lfs.sha256 if entry.lfs else None
        files[entry.rfilename] = HubFile(entry.rfilename, entry.size or 0, sha256, sha256 or entry.blob_id or "")
    if info.sha is None or not files:
        raise HubError(f"the hub says nothing of the files of {name}; check HF_ENDPOINT, or download it yourself")
    return HubModel(name, revision or "main", info.sha, files)


def find_cached(name: str, revision: str | None) -> Path:
    """The repository's folder in the client's cache; used when HF_HUB_OFFLINE is set. Raises HubError."""
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        raise HubError(
            f"{name} is not in the cache ({huggingface_hub.constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE is set; "
            "unset it, or give a directory that holds the checkpoint"
        )
    return Path(found).parent


def offline() -> bool:
    return bool(is_offline_mode())


def fetch_description(model: HubModel, folder: Path) -> list[HubFile]:
    """Fill ``folder`` with all that planning needs: small files, and weight files that are headers and holes.

    Returns the files of weights. Raises HubError, CheckpointError.
    """
    if model.revision != model.commit and "config.json" in model.files:
        with explain(model.name, model.revision):  # so that the cache knows the branch when there is no network
            hf_hub_download(model.name, "config.json", revision=model.revision, tqdm_class=QuietBar)
    for file in model.files.values():
        parts = Path(file.name).parts
        if file.num_bytes < 1 << 28 and (is_copied(parts[0]) or (len(parts) == 1 and parts[0].endswith(".json"))):
            with explain(model.name, model.revision):
                cached = hf_hub_download(model.name, file.name, revision=model.commit, tqdm_class=QuietBar)
            target = folder / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cached, target)
    weights = [model.files[name] for name in _weight_names(model, folder)]
    with ThreadPoolExecutor(8) as pool, explain(model.name, model.revision):
        for file, header in zip(weights, pool.map(lambda file: _fetch_header(model, file), weights), strict=True):
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(header)
            os.truncate(path, max(len(header), file.num_bytes))  # a hole: takes no disk
    return weights


def fetch_range(model: HubModel, name: str, offset: int, num_bytes: int) -> bytes:
    """A part of a file, in memory. Raises HubError."""
    url = hf_hub_url(model.name, name, revision=model.commit)
    headers = build_hf_headers() | {"Range": f"bytes={offset}-{offset + num_bytes - 1}", "Accept-Encoding": "identity"}
    with explain(model.name, model.revision):
        response = http_backoff("GET", url, headers=headers, timeout=60)
        hf_raise_for_status(response)
    content = bytes(response.content)
    if response.status_code == 200:  # a server without ranges sends all of it
        content = content[offset : offset + num_bytes]
    if len(content) != num_bytes:
        raise HubError(
            f"{name} of {model.name}: the hub sent {len(content)} bytes of {num_bytes} at offset {offset}; try again"
        )
    return content


def _weight_names(model: HubModel, folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if index.is_file():
        names = read_index_files(folder)
    elif SINGLE_NAME in model.files:
        names = [SINGLE_NAME]
    else:
        others = [name for name in sorted(model.files) if name.endswith((".bin", ".pth", ".pt", ".gguf"))]
        has = f"has its weights in {others[0]}" if others else "has no weights"
        raise CheckpointError(
            f"{model.name} {has}, expected {SINGLE_NAME} or {INDEX_NAME}; take a repository with safetensors"
        )
    missing = [name for name in names if name not in model.files]
    if missing:
        raise CheckpointError(
            f"{model.name} lacks {missing[0]}, named in its {INDEX_NAME}; the repository is incomplete, "
            "take another revision (--revision)"
        )
    return names


def _fetch_header(model: HubModel, file: HubFile) -> bytes:
    """The first bytes of a safetensors file: length and header. Checkpoint.open judges them."""
    data = fetch_range(model, file.name, 0, min(_FIRST_READ, file.num_bytes)) if file.num_bytes else b""
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or end > min(_MAX_HEADER_BYTES, file.num_bytes):
        return data
    if end > len(data):
        data += fetch_range(model, file.name, len(data), end - len(data))
    return data[:end]


@contextmanager
def explain(name: str, revision: str | None) -> Iterator[None]:
    """Turn the client's errors into a HubError, and keep its warnings (with URLs in them) to itself."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except (HTTPError, HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise
        raise HubError(_describe(error, name, revision)) from error
    finally:
        log.setLevel(level)


def _describe(error: Exception, name: str, revision: str | None) -> str:
    again = "run the same command again, it continues where it stopped"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated: accept its conditions on its page, then log in (`hf auth login`, or HF_TOKEN) "
            "with an account that has access"
        )
    if isinstance(error, DisabledRepoError):
        return f"{name} has been disabled on the hub; take another repository"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the hub has no model {name}, or not for you; check the spelling, and for a private one log in "
            "(`hf auth login`, or HF_TOKEN)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision or 'main'}; give a branch, a tag or a commit of it (--revision)"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"a file of {name} is gone from the hub; {again}, or take another revision (--revision)"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{name} is needed from the hub, but HF_HUB_OFFLINE is set; unset it, or give a directory "
            "that holds the checkpoint"
        )
    if isinstance(error, HFValidationError):
        return f"{name} is not a name that a hub can have; expected ORG/NAME"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"the hub answers with status {status} for {name}; {'log in, or ' if status == 401 else ''}{again} later"
    return (
        f"the hub cannot be reached for {name} ({type(error).__name__}); check the network, HTTPS_PROXY and "
        f"HF_ENDPOINT, then {again}, or set HF_HUB_OFFLINE=1 to use what is in the cache"
    )

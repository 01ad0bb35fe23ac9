"""Fetching a repository's weight files: each whole, of the size and hash that the hub states, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Protocol, TypeVar

from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers

from moray.runtime.convert.hub import HubFile, HubModel, QuietBar, explain
from moray.runtime.errors import HubError
from moray.runtime.store.receipt import Stopped, sha256_file

PARTIAL_SUFFIX = ".part"
_ATTEMPTS = 6  # in a row without a new byte
_LONGEST_PAUSE_S = 30.0
T = TypeVar("T")
Received = Callable[[int], None]


class Fetcher(Protocol):
    """Brings files of one repository into a folder."""

    folder: Path
    deletes: bool  # whether the files are ours to delete

    def fetch(self, file: HubFile) -> str:
        """Make a file whole. Returns its sha256. Raises HubError; OSError if the disk is full; Stopped."""
        ...


def _bar(stop: Event, received: Received) -> type[QuietBar]:
    """A progress bar for the client to call; raising in it is the only way to end a download."""

    class Bar(QuietBar):
        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise Stopped
            received(int(n or 0))
            return None

    return Bar


class _ToFolder:
    """What fetches files of ``model`` to ``folder``, until ``stop``; ``received`` is told of bytes."""

    def __init__(self, model: HubModel, folder: Path, stop: Event, received: Received) -> None:
        self.folder = folder
        self._model = model
        self._stop = stop
        self._received = received


class StreamFetcher(_ToFolder):
    """Fetches into a folder of ours, where files live only as long as pieces need them.

    The client starts a file anew in every process, so the part that arrived before is kept and continued here.
    """

    deletes = True

    def fetch(self, file: HubFile) -> str:
        path = self.folder / file.name
        part = path.with_name(path.name + PARTIAL_SUFFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # from an earlier run, perhaps not all of it on the disk before a crash
            path.replace(part)
        for attempt in range(2):
            _retry(lambda: self._continue(file, part), part, self._model.name, self._stop)
            digest = _check(file, part, self._model.name, last=attempt == 1)
            if digest is not None:
                part.replace(path)
                return digest
        raise AssertionError

    def _continue(self, file: HubFile, part: Path) -> None:
        url = hf_hub_url(self._model.name, file.name, revision=self._model.commit)
        with part.open("ab") as stream:
            present = stream.tell()
            if present > file.num_bytes:
                stream.truncate(0)
                present = 0
            if file.num_bytes > constants.MAX_HTTP_DOWNLOAD_SIZE and present == 0:
                raise HubError(f"{file.name} of {self._model.name} is too large to be streamed; leave --stream out")
            http_get(
                url,
                stream,
                resume_size=present,
                headers=build_hf_headers(),
                expected_size=file.num_bytes,
                displayed_filename=file.name,
                tqdm_class=_bar(self._stop, self._received),
                _nb_retries=0,  # ours below, which also knows connections that are reset
            )


class CacheFetcher(_ToFolder):
    """Fetches into the client's cache, shared with other programs; nothing is deleted."""

    deletes = False

    def fetch(self, file: HubFile) -> str:
        for attempt in range(2):
            path = _retry(partial(self._download, file, attempt > 0), None, self._model.name, self._stop)
            digest = _check(file, path, self._model.name, last=attempt == 1)
            if digest is not None:
                return digest
        raise AssertionError

    def _download(self, file: HubFile, again: bool) -> Path:
        bar = _bar(self._stop, self._received)
        revision = self._model.commit
        return Path(
            hf_hub_download(self._model.name, file.name, revision=revision, force_download=again, tqdm_class=bar)
        )


def _retry(act: Callable[[], T], part: Path | None, name: str, stop: Event) -> T:
    """Do it until it works, or failed several times in a row without bringing a new byte."""
    failures = 0
    while True:
        before = _size(part)
        try:
            with explain(name, None):
                return act()
        except HubError as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures >= _ATTEMPTS or not _may_pass(error.__cause__):
                raise
        if stop.wait(min(_LONGEST_PAUSE_S, 0.5 * 2 ** (failures - 1))):
            raise Stopped


def _may_pass(cause: BaseException | None) -> bool:
    """Whether an error can go away by itself: not one of these, which the hub means."""
    response = getattr(cause, "response", None)
    return cause is not None and (
        response is None or response.status_code in (401, 408, 416, 429) or _is_server(response)
    )


def _is_server(response: object) -> bool:
    return getattr(response, "status_code", 0) >= 500


def _size(path: Path | None) -> int:
    return path.stat().st_size if path is not None and path.exists() else 0


def _check(file: HubFile, path: Path, name: str, *, last: bool) -> str | None:
    """The file's sha256, or None if it is not what the hub says and may be fetched again."""
    found = path.stat().st_size
    digest = sha256_file(path) if found == file.num_bytes else ""
    if digest and file.sha256 in (None, digest):
        return digest
    if last:
        what = f"{found} bytes, expected {file.num_bytes}" if not digest else "another sha256 than the hub states"
        path.unlink(missing_ok=True)
        raise HubError(
            f"{file.name} of {name} arrived twice with {what}; run the same command again later, or use another mirror"
        )
    if path.suffix == PARTIAL_SUFFIX:
        path.unlink()
    return None

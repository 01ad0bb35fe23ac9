"""kill -9 and full disks: whatever stops a conversion, running it again gives the same store."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.checkpoints import tiny_checkpoint
from helpers.hub import local_hub
from helpers.processes import start_python

from moray.runtime.convert.converter import convert
from moray.runtime.convert.workspace import DOWNLOAD_FOLDER
from moray.runtime.errors import ResourceError, StoreError
from moray.runtime.store.inspection import inspect, read_manifest
from moray.runtime.store.manifest import MANIFEST_NAME, Manifest
from moray.runtime.store.store import Store

NAME = "org/Tiny-MoE"
NUM_KILLS = 20


@pytest.fixture(scope="module")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("mixtral", tmp_path_factory.mktemp("faults") / "tiny", max_shard_size="150KB")


@pytest.fixture(scope="module")
def expected(many_files: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    return checksums(convert(many_files, tmp_path_factory.mktemp("expected") / "store"))


def checksums(manifest: Manifest) -> object:
    return manifest.trunk_checksum, {key: entry.checksum for key, entry in manifest.shards.items()}


def assert_whole(store: Path, expected: object) -> None:
    """Every byte, from the disk; and nothing of the conversion is left."""
    manifest = read_manifest(store)
    assert checksums(manifest) == expected
    assert [part for part in inspect(store, manifest) if part.reason] == []
    left = {entry.name for entry in store.iterdir()}
    assert not {name for name in left if name.endswith((".partial", ".journal")) or name == DOWNLOAD_FOLDER}


# ---------------------------------------------------------------------------------------- kill -9

# Forks a process for every conversion, so that torch is imported once. A line in: STORE MODE DELAY, DELAY < 0: never
# killed. A line out: the process's exit status, negative for a signal, and the seconds it took.
_NURSERY = textwrap.dedent("""
    import os, signal, sys, threading, time
    import moray.runtime.convert.hub_convert as hub
    from moray.runtime.convert.converter import convert

    for line in sys.stdin:
        store, mode, delay = line.rsplit(" ", 2)
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            try:
                if mode == "local":
                    convert(sys.argv[1], store)
                else:
                    hub.convert_from_hub(sys.argv[2], store, stream=mode == "stream")
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        if float(delay) >= 0:
            time.sleep(float(delay))
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, time.monotonic() - start, flush=True)
""")


@pytest.mark.long
@pytest.mark.parametrize("mode", ["local", "keep", "stream"])
def test_kills_at_random_points(many_files: Path, expected: object, tmp_path: Path, mode: str) -> None:
    """Each kill comes at a random time of what is left to do, until the conversion gets through."""
    chance = random.Random(mode)
    with local_hub() as hub:
        hub.add(NAME, many_files)
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache")}
        nursery = start_python("-c", _NURSERY, str(many_files), NAME, **environment)
        assert nursery.stdin is not None and nursery.stdout is not None

        def run(store: Path, delay: float) -> tuple[int, float]:
            nursery.stdin.write(f"{store} {mode} {delay}\n")  # type: ignore[union-attr]
            nursery.stdin.flush()  # type: ignore[union-attr]
            status, seconds = nursery.stdout.readline().split()  # type: ignore[union-attr]
            return int(status), float(seconds)

        try:
            status, seconds = run(tmp_path / "undisturbed", -1)
            assert status == 0
            kills, stores = 0, 0
            store = tmp_path / "store-0"
            while kills < NUM_KILLS:
                status, _ = run(store, chance.uniform(0, seconds))
                kills += status == -signal.SIGKILL
                assert status in (0, -signal.SIGKILL)
                if (store / MANIFEST_NAME).exists():
                    Store.open(store).close()  # what calls itself a store is one
                if status == 0 or chance.random() < 0.2:
                    assert run(store, -1)[0] == 0
                    assert_whole(store, expected)
                    stores += 1
                    store = tmp_path / f"store-{stores}"
            assert run(store, -1)[0] == 0
            assert_whole(store, expected)
        finally:
            nursery.kill()
            nursery.wait()
            nursery.stdin.close()
            nursery.stdout.close()


# -------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "moray-test", str(path)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


class Filler:
    """A progress that takes all room on a disk after some pieces."""

    def __init__(self, disk: Path, after: int) -> None:
        self._file, self._left = disk / "filler", after

    def start(self, total_bytes: int) -> None:
        pass

    def advance(self, num_bytes: int, what: str) -> None:
        self._left -= num_bytes > 0
        if self._left == 0:
            fill(self._file)


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as stream:
        for chunk in (bytes(1 << 20), bytes(4096)):
            try:
                while stream.write(chunk):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC


@pytest.mark.parametrize("after", [1, 7, 23, 40, 47])
def test_a_disk_that_is_full(
    small_disk: Path, many_files: Path, expected: object, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    store = small_disk / "store"
    with pytest.raises(ResourceError, match=r"is full .* run the same command again"):
        convert(many_files, store, progress=Filler(small_disk, after))
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(store)
    os.unlink(small_disk / "filler")
    assert checksums(convert(many_files, store)) == expected
    assert_whole(store, expected)


@pytest.mark.parametrize("after", [1, 20, 40])
def test_a_disk_that_is_full_of_streamed_files(
    small_disk: Path,
    many_files: Path,
    expected: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    use_hub: Callable[[Path], str],
) -> None:
    from moray.runtime.convert.hub_convert import convert_from_hub

    name, store = use_hub(many_files), small_disk / "store"
    with pytest.raises(ResourceError, match=r"is full .* run the same command again"):
        convert_from_hub(name, store, stream=True, progress=Filler(small_disk, after))
    os.unlink(small_disk / "filler")
    convert_from_hub(name, store, stream=True)
    assert_whole(store, expected)


@pytest.fixture
def use_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], str]]:
    """Serves a checkpoint; returns its name for this process."""
    from huggingface_hub import constants

    with local_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

        def serve(folder: Path) -> str:
            hub.add(NAME, folder)
            return NAME

        yield serve

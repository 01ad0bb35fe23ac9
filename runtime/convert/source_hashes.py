"""The sha256 of a local checkpoint's weight files, taken in a thread while they are converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from moray.runtime.convert.checkpoint import Checkpoint
from moray.runtime.errors import CheckpointError
from moray.runtime.store.receipt import FileHash, Stopped, sha256_file


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    return [checkpoint.path / name for name in sorted({entry.file for entry in checkpoint.tensors.values()})]


@contextmanager
def hash_in_background(paths: list[Path]) -> Iterator[Callable[[], dict[str, FileHash]]]:
    """Yields what waits for the hashes, by file name. Raises CheckpointError there if a file cannot be read."""
    stop = Event()
    found: dict[str, FileHash] = {}
    failed: list[OSError] = []

    def work() -> None:
        try:
            for path in paths:
                found[path.name] = FileHash(path.stat().st_size, sha256_file(path, stop))
        except Stopped:
            pass
        except OSError as error:
            failed.append(error)

    thread = Thread(target=work, name="moray-hash", daemon=True)

    def result() -> dict[str, FileHash]:
        thread.join()
        if failed:
            raise CheckpointError(f"cannot read {failed[0].filename}: {failed[0].strerror}") from failed[0]
        return found

    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()

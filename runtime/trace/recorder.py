"""Writing a trace while a model runs: the step appends a tuple, a thread packs and writes whole blocks."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

import msgpack

from moray.runtime.errors import TraceError
from moray.runtime.trace.format import TraceHeader

_BLOCK_RECORDS = 512
_MAX_BLOCKS_WAITING = 256  # a disk that stalls must not fill the memory

Record = tuple[Any, ...]


class TraceRecorder:
    """Records layer calls into a file, which is replaced.

    ``record`` and ``close`` are called by one thread. Nothing raises after the beginning: what ends a recording early
    is in ``error``, and the file holds what was written until then.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        """Raises TraceError if the file cannot be made."""
        self.path = path
        self.error: str | None = None
        self.num_records = 0
        self._block: list[Record] = []
        self._blocks: SimpleQueue[list[Record] | None] = SimpleQueue()
        self._is_closed = False
        try:
            # Unbuffered: closing must have nothing left to write, and so nothing to raise.
            self._file: BinaryIO = path.open("wb", buffering=0)
            self._write(msgpack.packb(header.encode()))
        except OSError as error:
            raise TraceError(f"cannot write {path}: {error.strerror}; choose another file") from error
        self._thread = threading.Thread(target=self._run, name="moray-trace", daemon=True)
        self._thread.start()

    def record(
        self,
        step: int,
        layer: int,
        num_tokens: int,
        experts: Sequence[int],
        tokens: Sequence[int] | None = None,
        missed: Sequence[int] = (),
        predicted: Mapping[int, Sequence[int]] | None = None,
        loaded_bytes: int = 0,
        wait_us: int = 0,
        compute_us: int = 0,
        lanes: Sequence[int] | None = None,
    ) -> None:
        """One layer call, as trace.format describes it. Sequences may be arrays of integers; they are kept, not
        copied, so the caller must not change them afterwards.

        ``step`` numbers the model's forward passes. ``experts`` ascend. ``tokens`` and ``lanes`` are aligned with them;
        None: 1 each, lane 0 each. ``missed``: those that had to be loaded. ``predicted``: distance -> experts, of
        layers that there are.
        """
        if self.error is not None or self._is_closed:
            return
        times = loaded_bytes, wait_us, compute_us
        self._block.append((step, layer, num_tokens, experts, tokens, missed, predicted, *times, lanes))
        self.num_records += 1
        if len(self._block) >= _BLOCK_RECORDS:
            self._hand_over()

    def close(self) -> None:
        """Write what is left and close the file. May be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        self._hand_over()
        self._blocks.put(None)
        self._thread.join()
        self._file.close()

    def _hand_over(self) -> None:
        if self._blocks.qsize() >= _MAX_BLOCKS_WAITING:
            self.error = f"{self.path}: the disk is too slow for the trace; the recording ended"
        else:
            self._blocks.put(self._block)
        self._block = []

    def _run(self) -> None:
        while (block := self._blocks.get()) is not None:
            if self.error is not None:
                continue
            try:
                self._write(b"".join(msgpack.packb(_compact(record), default=_plain) for record in block))
            except OSError as error:
                self.error = f"cannot write {self.path}: {error.strerror}; the recording ended"
            except Exception as error:  # a record that cannot be packed: the caller's mistake, never the step's end
                self.error = f"{self.path}: a record cannot be written ({error!r:.200}); the recording ended"

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]


def _compact(record: Record) -> Record:
    """Without what a reader assumes: one token for each expert, lane 0."""
    *head, tokens, missed, predicted, loaded, wait, compute, lanes = record
    if tokens is not None and all(count == 1 for count in tokens):
        tokens = None
    if lanes is not None and not any(lanes):
        lanes = None
    return (*head, tokens, missed, predicted or None, loaded, wait, compute, lanes)


def _plain(value: Any) -> Any:
    """NumPy's integers and arrays as Python's."""
    return value.tolist()

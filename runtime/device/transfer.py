"""Copies from host memory to the device, beside its computing."""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch

from moray.runtime.memory import format_bytes

_STAGING_BUFFERS = 3  # one is filled while another is copied and a third waits
_HOST_REGISTER_READ_ONLY = 8  # cudaHostRegisterReadOnly: the arena is mapped without the right to write
_log = logging.getLogger(__name__)


class Transfer(Protocol):
    """One copy under way."""

    def is_done(self) -> bool:
        """Whether ``wait`` would return at once."""
        ...

    def join(self) -> None:
        """What the device computes from now on comes after the copy. Does not wait for the copy itself."""
        ...

    def wait(self) -> float:
        """Wait for the copy: afterwards the host's memory is no longer read. Returns the seconds that it took."""
        ...


class Mover(Protocol):
    """Starts copies. Called by the step loop's thread; memory at ``address`` must stay mapped until ``wait``."""

    def register(self, address: int, num_bytes: int) -> bool:
        """Make a range of host memory one that the device reads by itself; False if it cannot."""
        ...

    def start(self, address: int, target: torch.Tensor, after: Any | None) -> Transfer:
        """Copy the bytes at ``address`` to ``target``, uint8 on the device, once ``after`` (of ``mark``) is done."""
        ...

    def mark(self) -> Any | None:
        """What the device was given to compute until now."""
        ...

    def close(self) -> None:
        """Wait for all copies, give registered memory back."""
        ...


def make_mover(device: torch.device, slot_bytes: int) -> Mover:
    return CudaMover(device, slot_bytes) if device.type == "cuda" else PlainMover()


def bytes_at(address: int, count: int) -> torch.Tensor:
    """uint8 [count] over memory that somebody else keeps alive."""
    return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address)))


class PlainMover:
    """Devices without streams: a copy is done when it has been started."""

    def register(self, address: int, num_bytes: int) -> bool:
        return True

    def start(self, address: int, target: torch.Tensor, after: Any | None) -> Transfer:
        started = perf_counter()
        target.copy_(bytes_at(address, len(target)))
        return _Done(perf_counter() - started)

    def mark(self) -> Any | None:
        return None

    def close(self) -> None:
        pass


class _Done:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def is_done(self) -> bool:
        return True

    def join(self) -> None:
        pass

    def wait(self) -> float:
        return self._seconds


class CudaMover:
    """A stream for copies. Memory that is not registered goes through a ring of pinned buffers, filled by a thread."""

    def __init__(self, device: torch.device, slot_bytes: int) -> None:
        self._device, self._slot_bytes = device, slot_bytes
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, "moray-device-copy")
        self._ring: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()  # with the last copy out of each
        self._registered: list[tuple[int, int]] = []  # address, end

    def register(self, address: int, num_bytes: int) -> bool:
        error = torch.cuda.cudart().cudaHostRegister(address, num_bytes, _HOST_REGISTER_READ_ONLY)
        if int(error) != 0:
            self._forget_error()
            _log.warning(
                "the device cannot read %s of shared memory by itself (cudaHostRegister: %s); shards go through pinned "
                "buffers, which is slower",
                format_bytes(num_bytes),
                error,
            )
            return False
        self._registered.append((address, address + num_bytes))
        return True

    def start(self, address: int, target: torch.Tensor, after: Any | None) -> Transfer:
        end = address + len(target)
        if any(first <= address and end <= last for first, last in self._registered):
            submitted: Future[_Copied] = Future()
            submitted.set_result(self._submit(bytes_at(address, len(target)), target, after, 0.0))
        else:
            submitted = self._thread.submit(self._stage, address, target, after)
        return _CudaTransfer(submitted, self._device)

    def mark(self) -> Any | None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def close(self) -> None:
        self._thread.shutdown()
        self._stream.synchronize()
        for first, _ in self._registered:
            torch.cuda.cudart().cudaHostUnregister(first)
        self._registered.clear()

    def _stage(self, address: int, target: torch.Tensor, after: Any | None) -> _Copied:
        """In the mover's thread."""
        if len(self._ring) < _STAGING_BUFFERS:
            buffer = torch.empty(self._slot_bytes, dtype=torch.uint8, pin_memory=True)
        else:
            buffer, copied = self._ring.popleft()
            if copied is not None:
                copied.synchronize()
        started = perf_counter()
        source = buffer[: len(target)].copy_(bytes_at(address, len(target)))
        found = self._submit(source, target, after, perf_counter() - started)
        self._ring.append((buffer, found.end))
        return found

    def _submit(self, source: torch.Tensor, target: torch.Tensor, after: Any | None, staging_s: float) -> _Copied:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            begin.record(self._stream)
            target.copy_(source, non_blocking=True)
            end.record(self._stream)
        return _Copied(begin, end, staging_s)

    def _forget_error(self) -> None:
        """CUDA reports a failed call once more at the next launch: make one that may fail."""
        try:
            torch.zeros(1, device=self._device)
        except RuntimeError as error:
            _log.debug("reported again: %s", error)


class _Copied:
    """A copy given to the device, and how long filling the pinned buffer took before."""

    def __init__(self, begin: torch.cuda.Event, end: torch.cuda.Event, staging_s: float) -> None:
        self.begin, self.end, self.staging_s = begin, end, staging_s


class _CudaTransfer:
    def __init__(self, submitted: Future[_Copied], device: torch.device) -> None:
        self._submitted, self._device = submitted, device

    def is_done(self) -> bool:
        return self._submitted.done() and bool(self._submitted.result().end.query())

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._submitted.result().end)

    def wait(self) -> float:
        copied = self._submitted.result()
        copied.end.synchronize()
        # Filling and copying overlap from one shard to the next: the slower one is what a shard takes.
        return max(1e-3 * float(copied.begin.elapsed_time(copied.end)), copied.staging_s)

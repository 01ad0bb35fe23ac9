"""The memory readers: they read every byte."""

from __future__ import annotations

import numpy as np
import pytest

from moray.runtime.kernels import readers

SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 511, 512, 513, 1023, 4096, 4097, 70_001, 1 << 20, (1 << 20) + 33, (17 << 20) + 5]


@pytest.fixture(scope="module")
def random_bytes() -> readers.Bytes:
    return np.random.default_rng(0).integers(0, 256, (17 << 20) + 100, dtype=np.uint8)


def sum_of_words(buffer: readers.Bytes) -> int:
    padded = buffer.tobytes() + bytes(-buffer.size % 8)
    return sum(int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)) % (1 << 64)


@pytest.mark.parametrize("size", SIZES[:-3])
def test_the_checksum_is_the_sum_of_words(size: int, random_bytes: readers.Bytes) -> None:
    assert readers.checksum(random_bytes[:size]) == sum_of_words(random_bytes[:size])


@pytest.mark.parametrize("reader", readers.READERS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 8, 64])
def test_readers_return_the_checksum(reader: str, threads: int, start: int, random_bytes: readers.Bytes) -> None:
    for size in SIZES:
        part = random_bytes[start : start + size]
        assert readers.read(part, threads, reader) == readers.checksum(part), size


@pytest.mark.parametrize("reader", readers.READERS)
@pytest.mark.parametrize("threads", [1, 2])
def test_no_byte_is_skipped(reader: str, threads: int) -> None:
    buffer = np.zeros(9 * 512 + 77, dtype=np.uint8)
    for at in range(buffer.size):
        buffer[at] = 1
        assert readers.read(buffer, threads, reader) == 1 << 8 * (at % 8), at
        buffer[at] = 0


def test_bandwidth_is_a_rate(random_bytes: readers.Bytes) -> None:
    assert readers.read_bandwidth(random_bytes, threads=2, passes=2) > 0

"""The buffer of a ``Compute`` request.

row_of_pair   int32 [P]              which row each pair takes, pairs sorted by expert
peaks         float32 [T, H / group] \\  int8 with quantized experts: lossless, because the kernels
codes         int8 [T, H]            /  quantize to the same (runtime/kernels/wire.py)
or x          float32 [T, H]         in class float, and for experts in 16 or 32 bits
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moray.runtime.arrays import Bytes, Floats, Ints
from moray.runtime.errors import ProtocolError
from moray.runtime.kernels.wire import read_request, write_request
from moray.runtime.layout.packed import Numerics, PackedSpec


@dataclass(frozen=True, slots=True)
class WireFormat:
    """How a layer's activations travel. ``group`` 0: as float32."""

    columns: int
    group: int

    @classmethod
    def of(cls, gate_up: PackedSpec, numerics: Numerics) -> WireFormat:
        return cls(gate_up.columns, gate_up.group if numerics == "int8" and gate_up.is_quantized else 0)

    def num_bytes(self, num_rows: int, num_pairs: int) -> int:
        row = self.columns + 4 * (self.columns // self.group) if self.group else 4 * self.columns
        return 4 * num_pairs + row * num_rows

    def encode(self, x_TH: Floats, row_of_pair: Ints) -> Bytes:
        """The buffer for rows of x that pairs take."""
        buffer = np.empty(self.num_bytes(len(x_TH), len(row_of_pair)), dtype=np.uint8)
        write_request(np.ascontiguousarray(x_TH), np.ascontiguousarray(row_of_pair), self.group, buffer)
        return buffer

    def decode(self, data: bytes | memoryview, num_rows: int, num_pairs: int) -> tuple[Floats, Ints]:
        """Rows [T, H] and ``row_of_pair`` [P]. Raises ProtocolError unless the buffer is exactly that."""
        if num_rows < 1 or num_pairs < 1 or len(data) != self.num_bytes(num_rows, num_pairs):
            raise ProtocolError(
                f"found {len(data)} bytes, expected {num_rows} rows of {self.columns} activations in groups of "
                f"{self.group} for {num_pairs} pairs"
            )
        buffer = np.frombuffer(data, dtype=np.uint8)
        if not buffer.flags.writeable:
            buffer = buffer.copy()  # to Numba, arrays that may not be written are another type
        x_TH, row_of_pair = np.empty((num_rows, self.columns), dtype=np.float32), np.empty(num_pairs, dtype=np.int64)
        if not read_request(buffer, self.group, row_of_pair, x_TH):
            raise ProtocolError(f"a pair takes a row that is not one of the {num_rows}")
        return x_TH, row_of_pair

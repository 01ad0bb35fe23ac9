"""Small computations that a remote host is measured with before it gets work: how fast it computes, and the way there.

One after the other, with an expert that it has in memory. The first of each size warms up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moray.cluster.messages import Compute
from moray.runtime.arrays import Bools
from moray.runtime.lanes.rates import Rate
from moray.runtime.layout.packed import Numerics
from moray.runtime.store.store import Store

_FEW_ROWS, _MANY_ROWS, _NUM_FEW = 1, 16, 3
_ROWS = (*(1 + _NUM_FEW) * (_FEW_ROWS,), _MANY_ROWS, _MANY_ROWS)
_WARM_UPS = (0, 1 + _NUM_FEW)  # which of them
_LEAST_RATE = 1e-15  # s for a byte: what noise may not make zero or less


class HostTrials:
    """Trials of one host, from the first to the last."""

    def __init__(self, store: Store, numerics: Numerics) -> None:
        self._store, self._numerics = store, numerics
        self._seconds: list[float] = []
        self._expert_bytes = 0
        self.wire_bytes = 0  # of the last one, there and back

    def next(self, resident: Sequence[Bools]) -> tuple[Compute, memoryview] | None:
        """What to send. None: all are done, or the host has nothing in memory that it could compute.

        ``resident`` [layer][E].
        """
        # Imported here: who only reads a host's statistics does not load Numba.
        from moray.cluster.activations import WireFormat

        layer = max(range(len(resident)), key=lambda i: resident[i].sum())
        layout = self._store.manifest.layers[layer].layout
        gate_up = layout.get("gate_up_proj")
        if self._is_done or gate_up is None or gate_up.spec is None or not resident[layer].any():
            return None
        num_rows, expert = _ROWS[len(self._seconds)], int(resident[layer].argmax())
        form = WireFormat.of(gate_up.spec, self._numerics)
        x_TH = np.ones((num_rows, form.columns), dtype=np.float32)
        buffer = form.encode(x_TH, np.arange(num_rows, dtype=np.int64))
        self._expert_bytes, self.wire_bytes = layout.num_bytes, len(buffer) + 4 * num_rows * form.columns
        message = Compute(layer=layer, experts=[expert], counts=[num_rows], num_rows=num_rows, numerics=self._numerics)
        return message, buffer.data

    def done(self, compute_s: float) -> bool:
        """The last one was answered. Returns whether its time counts."""
        self._seconds.append(compute_s)
        return len(self._seconds) - 1 not in _WARM_UPS

    def rate(self) -> Rate | None:
        """What was found, or None if it was not measured."""
        if not self._is_done:
            return None
        one_s, many_s = min(self._seconds[1 : 1 + _NUM_FEW]), self._seconds[-1]
        pair_s = max((many_s - one_s) / (_MANY_ROWS - _FEW_ROWS), 1e-8)
        return Rate(0.0, max(one_s - pair_s, self._expert_bytes * _LEAST_RATE) / self._expert_bytes, pair_s)

    @property
    def _is_done(self) -> bool:
        return len(self._seconds) == len(_ROWS)

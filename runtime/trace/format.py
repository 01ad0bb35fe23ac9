"""The trace format: a msgpack stream of one header and one record for each layer call.

    header  {"kind": "moray-trace", "format": 1, "fingerprint", "family", "experts": [per MoE layer],
             "shard_bytes": [per MoE layer], "top_k", "slots", "policy", "note", "lanes": [names]}
    record  [step, layer, num_tokens, experts, tokens, missed, predicted, loaded_bytes, wait_us, compute_us, lanes]

``experts`` ascend and are numbered within their layer; ``tokens`` and ``lanes`` are aligned with them, or nil if all
are 1 (tokens) or 0 (lanes). ``missed`` had to be loaded for this call. ``predicted`` maps a distance d to the experts
that this layer's state predicted for layer + d of the same step, the most likely first; nil if nothing was predicted.
Records are appended: a file that ends within one is read up to there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from moray.runtime.arrays import Bools, Ints
from moray.runtime.errors import TraceError
from moray.runtime.store.manifest import Manifest

FORMAT_VERSION = 1
KIND = "moray-trace"
RECORD_FIELDS = 11


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What was recorded."""

    fingerprint: str  # of the store
    family: str
    num_experts: tuple[int, ...]  # of each MoE layer
    shard_bytes: tuple[int, ...]  # of one expert of each MoE layer
    top_k: int | None = None
    num_slots: int | None = None  # None: everything was resident
    policy: str = ""
    note: str = ""
    lanes: tuple[str, ...] = ("arena",)  # the names of the lanes that records number

    @classmethod
    def of(cls, manifest: Manifest, fingerprint: str, **known: Any) -> TraceHeader:
        """Of a store; ``known``: the fields that its manifest does not tell."""
        return cls(
            fingerprint=fingerprint,
            family=manifest.family,
            num_experts=tuple(layer.num_experts for layer in manifest.layers),
            shard_bytes=tuple(layer.layout.num_bytes for layer in manifest.layers),
            **known,
        )

    def encode(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "format": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "family": self.family,
            "experts": list(self.num_experts),
            "shard_bytes": list(self.shard_bytes),
            "top_k": self.top_k,
            "slots": self.num_slots,
            "policy": self.policy,
            "note": self.note,
            "lanes": list(self.lanes),
        }


class Ragged(NamedTuple):
    """A list for each layer call: that of call c is ``values[starts[c]:starts[c + 1]]``."""

    starts: Ints  # [C + 1]
    values: Ints


@dataclass(frozen=True, slots=True)
class Trace:
    """C layer calls in order, and U uses: a use is one expert of one layer call."""

    header: TraceHeader
    steps_C: Ints
    layers_C: Ints
    num_tokens_C: Ints
    loaded_bytes_C: Ints
    wait_us_C: Ints
    compute_us_C: Ints
    starts: Ints  # [C + 1]: the uses of call c are starts[c]:starts[c + 1]
    experts_U: Ints  # within their layer
    tokens_U: Ints
    missed_U: Bools
    lanes_U: Ints
    predicted: dict[int, Ragged]  # distance -> experts predicted for layer + distance, within that layer
    torn_bytes: int  # at the end of the file, of a record that was not written whole

    @property
    def num_steps(self) -> int:
        return len(np.unique(self.steps_C))

    @property
    def is_prefill_C(self) -> Bools:
        """Calls with several tokens; the others are decode calls."""
        return self.num_tokens_C > 1

    def calls(self) -> list[list[int]]:
        """The experts of each layer call, numbered over all layers in layer order, as policies number them."""
        first = np.concatenate([[0], np.cumsum(self.header.num_experts)])
        numbers = (self.experts_U + np.repeat(first[self.layers_C], np.diff(self.starts))).tolist()
        return [numbers[a:b] for a, b in pairwise(self.starts.tolist())]


def read_trace(path: Path) -> Trace:
    """Read a trace. Raises TraceError: no such file, no trace, a newer format, damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            unpacker = msgpack.Unpacker(file, strict_map_key=False, max_buffer_size=max(size, 1))
            header = _decode_header(unpacker, path)
            records, end = _Records(header), unpacker.tell()
            for index, record in enumerate(unpacker):
                try:
                    records.add(record)
                except (ValueError, TypeError, AttributeError, IndexError) as error:
                    raise TraceError(f"{path} is damaged: record {index} ({error!r:.200}); record it again") from error
                end = unpacker.tell()
            return records.trace(torn_bytes=size - end)
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from error
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError) as error:
        raise TraceError(f"{path} is damaged ({error!r:.200}); record it again") from error


def _decode_header(unpacker: Any, path: Path) -> TraceHeader:
    try:
        document = unpacker.unpack()
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        raise TraceError(f"{path} is not a trace; record one with `moray trace record`") from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise TraceError(f"{path} is not a trace; record one with `moray trace record`")
    version = document.get("format")
    if version != FORMAT_VERSION:
        raise TraceError(
            f"{path} has trace format {version!r:.40}, this moray reads format {FORMAT_VERSION}; "
            + ("upgrade moray" if isinstance(version, int) and version > FORMAT_VERSION else "record it again")
        )
    try:
        header = TraceHeader(
            fingerprint=_text(document["fingerprint"]),
            family=_text(document["family"]),
            num_experts=tuple(_count(n) for n in document["experts"]),
            shard_bytes=tuple(_count(n) for n in document["shard_bytes"]),
            top_k=None if document["top_k"] is None else _count(document["top_k"]),
            num_slots=None if document["slots"] is None else _count(document["slots"]),
            policy=_text(document["policy"]),
            note=_text(document["note"]),
            lanes=tuple(_text(name) for name in document["lanes"]),
        )
        if not header.num_experts or len(header.shard_bytes) != len(header.num_experts):
            raise ValueError(f"{len(header.num_experts)} layers of experts, {len(header.shard_bytes)} of shards")
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path} is damaged: its header ({error!r:.200}); record it again") from error
    return header


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError(f"{value!r:.40} is not text")
    return value


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise TypeError(f"{value!r:.40} is not a count")
    return value


class _Records:
    """Records on their way into arrays."""

    def __init__(self, header: TraceHeader) -> None:
        self._header = header
        self._calls: list[tuple[int, ...]] = []  # step, layer, tokens, loaded bytes, wait and compute time
        self._starts = [0]
        self._uses: list[tuple[int, int, bool, int]] = []  # expert, tokens, missed, lane
        self._predicted: dict[int, tuple[list[int], list[int]]] = {}  # distance -> ends of calls, experts

    def add(self, record: Any) -> None:
        """Raises ValueError, TypeError, AttributeError or IndexError for what is no record of this trace."""
        if type(record) is not list or len(record) != RECORD_FIELDS:
            raise TypeError(f"{record!r:.40} is not a record")
        step, layer, num_tokens, experts, tokens, missed, predicted, *sizes, lanes = record
        call = tuple(_count(n) for n in (step, layer, num_tokens, *sizes))
        self._check_experts(layer, experts)
        tokens = [1] * len(experts) if tokens is None else [_count(n) for n in tokens]
        lanes = [0] * len(experts) if lanes is None else [_count(n) for n in lanes]
        if not set(missed) <= set(experts) or any(lane >= len(self._header.lanes) for lane in lanes):
            raise ValueError("missed experts that were not used, or a lane that the header does not name")
        missed_E = [expert in missed for expert in experts]
        self._uses += zip(experts, tokens, missed_E, lanes, strict=True)
        self._starts.append(len(self._uses))
        for distance, guess in (predicted or {}).items():
            self._check_experts(layer + distance, guess)
            ends, values = self._predicted.setdefault(_count(distance), ([0] * (len(self._calls) + 1), []))
            values += guess
        self._calls.append(call)
        for ends, values in self._predicted.values():
            ends.append(len(values))

    def trace(self, torn_bytes: int) -> Trace:
        steps, layers, num_tokens, loaded, wait, compute = _columns(self._calls, 6)
        experts, tokens, missed, lanes = _columns(self._uses, 4)
        return Trace(
            header=self._header,
            steps_C=steps,
            layers_C=layers,
            num_tokens_C=num_tokens,
            loaded_bytes_C=loaded,
            wait_us_C=wait,
            compute_us_C=compute,
            starts=np.array(self._starts, dtype=np.int64),
            experts_U=experts,
            tokens_U=tokens,
            missed_U=missed.astype(bool),
            lanes_U=lanes,
            predicted={
                distance: Ragged(np.array(ends, dtype=np.int64), np.array(values, dtype=np.int64))
                for distance, (ends, values) in sorted(self._predicted.items())
            },
            torn_bytes=torn_bytes,
        )

    def _check_experts(self, layer: int, experts: list[int]) -> None:
        """Distinct experts of one layer."""
        count = self._header.num_experts[_count(layer)]
        if any(_count(expert) >= count for expert in experts) or len(set(experts)) != len(experts):
            raise ValueError(f"experts {experts!r:.80} of a layer of {count}")


def _columns(rows: Iterable[tuple[int, ...]], count: int) -> Ints:
    """[count, rows]."""
    return np.array(list(rows), dtype=np.int64).reshape(-1, count).T.copy()

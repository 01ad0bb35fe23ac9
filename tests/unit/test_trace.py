"""The trace format, its recorder, and what is read from traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moray.runtime.errors import TraceError
from moray.runtime.trace.format import RECORD_FIELDS, Trace, TraceHeader, read_trace
from moray.runtime.trace.recall import recall_by_distance
from moray.runtime.trace.recorder import TraceRecorder

TRACES = sorted((Path(__file__).parents[1] / "data" / "traces").glob("*.msgpack"))
HEADER = TraceHeader(
    fingerprint="f00d",
    family="mixtral",
    num_experts=(4, 6, 5),
    shard_bytes=(4096, 8192, 4096),
    top_k=2,
    num_slots=7,
    policy="lfu",
    note="a note",
    lanes=("arena", "disk"),
)

Call = dict[str, Any]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    layer = draw(st.integers(0, 2))
    experts = sorted(draw(st.sets(st.integers(0, HEADER.num_experts[layer] - 1))))
    guesses = (
        {
            distance: draw(st.lists(st.integers(0, HEADER.num_experts[layer + distance] - 1), unique=True))
            for distance in draw(st.sets(st.integers(1, 2 - layer))) or ()
        }
        if layer < 2
        else {}
    )
    aligned = {"min_size": len(experts), "max_size": len(experts)}
    count = st.integers(0, 1 << 40)
    return {
        "step": draw(count),
        "layer": layer,
        "num_tokens": draw(st.integers(1, 4096)),
        "experts": experts,
        "tokens": draw(st.none() | st.lists(st.integers(1, 4096), **aligned)),
        "missed": [expert for expert in experts if draw(st.booleans())],
        "predicted": draw(st.sampled_from([None, guesses])),
        "loaded_bytes": draw(count),
        "wait_us": draw(count),
        "compute_us": draw(count),
        "lanes": draw(st.none() | st.lists(st.integers(0, 1), **aligned)),
    }


def record(path: Path, rows: Sequence[Call], header: TraceHeader = HEADER) -> TraceRecorder:
    recorder = TraceRecorder(path, header)
    for row in rows:
        recorder.record(**row)
    recorder.close()
    assert recorder.error is None and recorder.num_records == len(rows)
    return recorder


def rows_of(trace: Trace) -> list[Call]:
    """What was recorded, with what a reader assumes filled in."""
    rows = []
    for call in range(len(trace.steps_C)):
        uses = slice(trace.starts[call], trace.starts[call + 1])
        guesses = {
            distance: values[starts[call] : starts[call + 1]].tolist()
            for distance, (starts, values) in trace.predicted.items()
        }
        rows.append(
            {
                "step": int(trace.steps_C[call]),
                "layer": int(trace.layers_C[call]),
                "num_tokens": int(trace.num_tokens_C[call]),
                "experts": trace.experts_U[uses].tolist(),
                "tokens": trace.tokens_U[uses].tolist(),
                "missed": trace.experts_U[uses][trace.missed_U[uses]].tolist(),
                "predicted": {distance: guess for distance, guess in guesses.items() if guess},
                "loaded_bytes": int(trace.loaded_bytes_C[call]),
                "wait_us": int(trace.wait_us_C[call]),
                "compute_us": int(trace.compute_us_C[call]),
                "lanes": trace.lanes_U[uses].tolist(),
            }
        )
    return rows


def filled(row: Call) -> Call:
    count = len(row["experts"])
    return row | {
        "tokens": row["tokens"] or [1] * count,
        "lanes": row["lanes"] or [0] * count,
        "predicted": {distance: guess for distance, guess in (row["predicted"] or {}).items() if guess},
    }


# ------------------------------------------------------------------------------------- format


@given(st.lists(calls(), max_size=30))
def test_what_is_recorded_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[Call]) -> None:
    path = tmp_path_factory.mktemp("traces") / "a.trace"
    record(path, rows)
    trace = read_trace(path)
    assert trace.header == HEADER and trace.torn_bytes == 0
    assert rows_of(trace) == [filled(row) for row in rows]


def test_arrays_and_many_blocks_are_recorded(tmp_path: Path) -> None:
    used = np.array([1, 3])
    rows: list[Call] = [
        {"step": step, "layer": 0, "num_tokens": 1, "experts": used, "tokens": np.array([1, 1]), "missed": used[:1]}
        for step in range(1500)
    ]
    record(tmp_path / "a.trace", rows)
    trace = read_trace(tmp_path / "a.trace")
    assert trace.steps_C.tolist() == list(range(1500)) and trace.num_steps == 1500
    assert trace.experts_U.tolist() == [1, 3] * 1500 and trace.missed_U.tolist() == [True, False] * 1500
    assert trace.calls()[:2] == [[1, 3], [1, 3]]


def test_experts_are_numbered_over_all_layers(tmp_path: Path) -> None:
    rows: list[Call] = [
        {"step": 0, "layer": layer, "num_tokens": 2, "experts": experts}
        for layer, experts in enumerate([[0, 3], [], [1, 4]])
    ]
    record(tmp_path / "a.trace", rows)
    trace = read_trace(tmp_path / "a.trace")
    assert trace.calls() == [[0, 3], [], [11, 14]] and trace.is_prefill_C.all()


def test_a_trace_cut_anywhere_is_read_up_to_there(tmp_path: Path) -> None:
    rows: list[Call] = [{"step": step, "layer": 1, "num_tokens": 1, "experts": [step, 5]} for step in range(5)]
    record(tmp_path / "a.trace", rows)
    whole = (tmp_path / "a.trace").read_bytes()
    header_bytes = len(msgpack.packb(HEADER.encode()))
    record_bytes = (len(whole) - header_bytes) // 5
    torn = tmp_path / "torn.trace"
    for size in range(header_bytes, len(whole) + 1):
        torn.write_bytes(whole[:size])
        trace = read_trace(torn)
        assert trace.steps_C.tolist() == list(range((size - header_bytes) // record_bytes))
        assert trace.torn_bytes == (size - header_bytes) % record_bytes
    for size in range(header_bytes):
        torn.write_bytes(whole[:size])
        with pytest.raises(TraceError, match=r"torn.trace is not a trace; record one with"):
            read_trace(torn)


def test_files_that_are_no_traces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    with pytest.raises(TraceError, match=r"cannot read .*a.trace: No such file"):
        read_trace(path)
    for data in (b"hello", b"\xc1", msgpack.packb([1]), msgpack.packb({"format": 1}), b"\xdf\xff\xff\xff\xff"):
        path.write_bytes(data)
        with pytest.raises(TraceError, match="is not a trace"):
            read_trace(path)
    for version, remedy in ((2, "upgrade moray"), (0, "record it again"), ("x", "record it again")):
        path.write_bytes(msgpack.packb(HEADER.encode() | {"format": version}))
        with pytest.raises(TraceError, match=f"has trace format {version!r}, this moray reads format 1; {remedy}"):
            read_trace(path)


@pytest.mark.parametrize(
    "change",
    [
        {"experts": []},
        {"experts": [4, -1, 5]},
        {"shard_bytes": [1]},
        {"family": 3},
        {"top_k": "2"},
        {"slots": -1},
        {"lanes": 3},
        {"note": "two\nlines"},
    ],
    ids=str,
)
def test_damaged_headers_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "a.trace"
    path.write_bytes(msgpack.packb(HEADER.encode() | change))
    with pytest.raises(TraceError, match=r"a.trace is damaged: its header \(.*\); record it again"):
        read_trace(path)


GOOD = [0, 1, 1, [2, 3], None, [3], {1: [4]}, 8192, 5, 6, None]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, -1),
        (0, 1 << 63),
        (1, 3),
        (1, "1"),
        (2, None),
        (3, [2, 6]),
        (3, [2, 2]),
        (3, None),
        (4, [1]),
        (4, [1, "1"]),
        (5, [4]),
        (5, 3),
        (6, {2: [0]}),
        (6, {1: [5]}),
        (6, [1]),
        (7, 1.5),
        (10, [0, 2]),
        (10, [0]),
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, field: int, value: object) -> None:
    path = tmp_path / "a.trace"
    bad = [*GOOD[:field], value, *GOOD[field + 1 :]]
    head = msgpack.packb(HEADER.encode()) + msgpack.packb(GOOD)
    path.write_bytes(head + msgpack.packb(GOOD))
    assert len(read_trace(path).steps_C) == 2
    path.write_bytes(head + msgpack.packb(bad))
    with pytest.raises(TraceError, match=r"a.trace is damaged: record 1 \(.*\); record it again"):
        read_trace(path)


@given(st.binary(max_size=80), st.integers(0, 2))
@example(b"\x81\x90\x00", 0)  # a map with a list as a key
@example(b"\x81\x90\x00", 1)
def test_no_bytes_end_in_another_error(tmp_path_factory: pytest.TempPathFactory, data: bytes, after: int) -> None:
    path = tmp_path_factory.mktemp("traces") / "a.trace"
    head = [b"", msgpack.packb(HEADER.encode()), msgpack.packb(HEADER.encode()) + bytes([0x90 + RECORD_FIELDS])]
    path.write_bytes(head[after] + data)
    try:
        read_trace(path)
    except TraceError as error:
        assert "\n" not in str(error)


# ----------------------------------------------------------------------------------- recorder


def test_a_file_that_cannot_be_made_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot write .*none/a.trace: No such file or directory; choose another"):
        TraceRecorder(tmp_path / "none" / "a.trace", HEADER)


def test_a_full_disk_ends_the_recording_and_not_the_step(tmp_path: Path) -> None:
    recorder = TraceRecorder(tmp_path / "a.trace", HEADER)
    recorder._file.close()
    recorder._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for step in range(2000):
        recorder.record(step, 0, 1, [1, 2])
    recorder.close()
    assert recorder.error == f"cannot write {tmp_path / 'a.trace'}: No space left on device; the recording ended"
    recorder.record(0, 0, 1, [1, 2])
    recorder.close()


def test_a_record_that_cannot_be_packed_ends_the_recording_and_not_the_step(tmp_path: Path) -> None:
    recorder = TraceRecorder(tmp_path / "a.trace", HEADER)
    recorder.record(0, 0, 1, [object()])  # type: ignore[list-item]
    recorder.close()
    assert recorder.error is not None and "a record cannot be written" in recorder.error
    assert len(read_trace(tmp_path / "a.trace").steps_C) == 0


# ------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_the_recorded_traces_are_of_tiny_mixtral_on_real_text(path: Path) -> None:
    trace = read_trace(path)
    assert trace.torn_bytes == 0 and trace.header.num_experts == (8,) * 6 and trace.header.top_k == 2
    decode = ~trace.is_prefill_C
    assert trace.num_steps >= 1000 and trace.layers_C.tolist() == list(range(6)) * trace.num_steps
    assert (np.diff(trace.starts)[decode] == 2).all()
    assert sorted(trace.predicted) == [1, 2, 3]


def test_there_are_three_recorded_traces() -> None:
    assert len(TRACES) == 3 and all(path.stat().st_size < 300_000 for path in TRACES)


def test_recall_counts_decode_calls_that_something_was_predicted_for(tmp_path: Path) -> None:
    rows: list[Call] = [
        {"step": 0, "layer": 0, "num_tokens": 9, "experts": [0, 1, 2], "predicted": {1: [0, 1]}},
        {"step": 0, "layer": 1, "num_tokens": 9, "experts": [0, 1, 2], "predicted": {1: [0]}},
        {"step": 1, "layer": 0, "num_tokens": 1, "experts": [0, 1], "predicted": {1: [5, 3, 4], 2: [0, 1]}},
        {"step": 1, "layer": 1, "num_tokens": 1, "experts": [3, 4], "predicted": {1: [0, 1]}},
        {"step": 1, "layer": 2, "num_tokens": 1, "experts": [1, 2]},
        {"step": 2, "layer": 0, "num_tokens": 1, "experts": [0, 1], "predicted": {1: [4, 3]}},
        {"step": 2, "layer": 1, "num_tokens": 1, "experts": [3, 4]},
        {"step": 2, "layer": 2, "num_tokens": 1, "experts": [1, 2]},
    ]
    record(tmp_path / "a.trace", rows)
    # One ahead: {5, 3} for {3, 4}; {0, 1} for {1, 2}; {4, 3} for {3, 4}. Two ahead: {0, 1} for {1, 2}.
    assert recall_by_distance(read_trace(tmp_path / "a.trace")) == {1: 4 / 6, 2: 1 / 2}
    record(tmp_path / "b.trace", rows[:2])
    assert recall_by_distance(read_trace(tmp_path / "b.trace")) == {}


def test_recall_on_real_text_falls_with_the_distance_and_beats_chance() -> None:
    for path in TRACES:
        recall = recall_by_distance(read_trace(path))
        assert recall[1] > recall[2] > recall[3] > 2 / 8


def test_headers_without_a_budget_are_kept(tmp_path: Path) -> None:
    header = replace(HEADER, top_k=None, num_slots=None, policy="")
    record(tmp_path / "a.trace", [], header)
    assert read_trace(tmp_path / "a.trace").header == header

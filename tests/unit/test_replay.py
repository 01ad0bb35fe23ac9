"""Replayed expert choices of benchmarks/: mapped traces, and models whose routers follow them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moray.runtime.convert.recipe import Recipe
from moray.runtime.generation.request import GenerationRequest

_NAMES = ("common", "direct_file", "disk", "geometry", "gguf_file", "make_gguf", "make_store", "planted", "replay")
_TOKENS, _LAYERS = 300, 6


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[SimpleNamespace]:
    """The benchmarks' modules, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in (*_NAMES, "routing")})


@pytest.fixture
def trace(benchmarks: SimpleNamespace) -> object:
    """Choices that mostly stay, of 8 experts top 2, and predictions of which about 3 in 4 are right."""
    random = np.random.default_rng(5)
    chosen = benchmarks.replay.uniform_choices(_TOKENS, _LAYERS, 8, 2, seed=7)
    for token in range(1, _TOKENS):
        stays = random.random(_LAYERS) < 0.7
        chosen[token, stays] = chosen[token - 1, stays]
    chosen = np.sort(chosen, axis=2)
    wrong = benchmarks.replay.uniform_choices(_TOKENS, _LAYERS, 8, 2, seed=8)
    predicted = np.where(random.random((_TOKENS, _LAYERS, 1)) < 0.7, chosen, wrong)
    predicted[:, 0] = -1
    return benchmarks.replay.Trace("made up", 8, chosen, {1: predicted})


def _hit_rate(chosen_TK: np.ndarray, size: int) -> float:
    """Of an LRU cache of so many experts."""
    cache: list[int] = []
    hits = 0
    for expert in chosen_TK.ravel().tolist():
        hits += expert in cache
        cache = [*[other for other in cache if other != expert][-size + 1 :], expert]
    return hits / chosen_TK.size


def test_first_layers_are_the_trace_and_later_ones_other_tokens_renamed(
    benchmarks: SimpleNamespace, trace: SimpleNamespace
) -> None:
    mapped = benchmarks.replay.map_choices(trace.chosen_TLK, 8, 14, 8, 2)
    assert np.array_equal(mapped[:, :_LAYERS], trace.chosen_TLK)
    shifted = np.roll(trace.chosen_TLK, -101, axis=0)[:, 1]
    names = {(a, b) for a, b in zip(shifted.ravel().tolist(), mapped[:, 7].ravel().tolist(), strict=True)}
    assert len(names) == 8 and len({b for _, b in names}) == 8  # one name for each expert
    assert not np.array_equal(mapped[:, 7], shifted) and not np.array_equal(mapped[:, 13], mapped[:, 7])
    again = benchmarks.replay.map_choices(trace.chosen_TLK, 8, 14, 8, 2)
    assert np.array_equal(mapped, again)


def test_128_experts_top_8_are_different_ones_in_their_slots_groups(
    benchmarks: SimpleNamespace, trace: SimpleNamespace
) -> None:
    mapped = benchmarks.replay.map_choices(trace.chosen_TLK, 8, 8, 128, 8)
    assert mapped.shape == (_TOKENS, 8, 8)
    assert np.array_equal(mapped // 32, np.broadcast_to([0, 0, 1, 1, 2, 2, 3, 3], mapped.shape))
    ordered = np.sort(mapped, axis=2)
    assert (ordered[..., 1:] > ordered[..., :-1]).all()
    first = trace.chosen_TLK[:, 1, 0] % 4  # slot 0 of layer 0 takes its group from layer 1
    assert np.array_equal(mapped[:, 0, :2], 8 * first[:, None] + trace.chosen_TLK[:, 0])
    uniform = benchmarks.replay.uniform_choices(_TOKENS, 1, 128, 8, seed=0)[:, 0]
    assert _hit_rate(mapped[:, 0], 32) > 2 * _hit_rate(uniform, 32)


def test_a_geometry_that_does_not_fit_is_refused(benchmarks: SimpleNamespace, trace: SimpleNamespace) -> None:
    with pytest.raises(SystemExit, match="does not map to 60 experts, top 4"):
        benchmarks.replay.map_choices(trace.chosen_TLK, 8, 8, 60, 4)
    with pytest.raises(SystemExit, match="raise --vocab"):
        benchmarks.replay.replay_traces([trace], tokens=200, layers=4, experts=8, active=2)


def test_predictions_are_mapped_as_choices_and_as_good_everywhere(
    benchmarks: SimpleNamespace, trace: SimpleNamespace
) -> None:
    replay = benchmarks.replay.replay_traces([trace], tokens=400, layers=13, experts=8, active=2)
    assert replay.starts == (0, _TOKENS, 400) and replay.names == ("made up", "uniform")
    predicted = replay.predicted[1]
    assert (predicted[:, 0] == -1).all() and (predicted[_TOKENS:] == -1).all()
    assert np.array_equal(predicted[:_TOKENS, 1:6], trace.predicted[1][:, 1:])
    right = (predicted[:_TOKENS, 1:, :, None] == replay.chosen_TLK[:_TOKENS, 1:, None]).any(axis=2).mean(axis=(0, 2))
    assert right.min() > 0.65 and right.max() < 0.9  # those of layers 6 and 12, which the trace has not, too
    assert (np.diff(np.sort(predicted[:_TOKENS, 1:], axis=2), axis=2) > 0).all()


def test_a_replay_is_kept_beside_its_store(benchmarks: SimpleNamespace, trace: SimpleNamespace, tmp_path: Path) -> None:
    made = benchmarks.replay.replay_traces([trace], tokens=400, layers=4, experts=8, active=2)
    made.save(tmp_path / "store")
    found = benchmarks.replay.load_replay(tmp_path / "store")
    assert np.array_equal(found.chosen_TLK, made.chosen_TLK) and np.array_equal(found.predicted[1], made.predicted[1])
    assert found.texts("trace") == [range(_TOKENS)] and found.texts("random") == [range(_TOKENS, 400)]
    assert found.distinct(3, 1)[2] == set(made.chosen_TLK[3, 2].tolist())
    with pytest.raises(SystemExit, match="--routing"):
        benchmarks.replay.load_replay(tmp_path / "other")


@pytest.mark.parametrize(
    ("preset", "recipe"),
    [
        ("tiny", "experts=hqq4:64,attention=hqq4:64,embeddings=hqq4:64"),
        ("tiny", "paper-2bit"),
        ("tiny-qwen", "experts=hqq3:32,attention=none"),
    ],
)
def test_a_store_chooses_as_planted_and_walks_on(
    benchmarks: SimpleNamespace, trace: SimpleNamespace, tmp_path: Path, preset: str, recipe: str
) -> None:
    geometry = replace(benchmarks.geometry.PRESETS[preset], hidden=256, layers=4, vocab=512)
    sizes = {"tokens": 512, "layers": 4, "experts": geometry.experts, "active": geometry.active}
    replay = benchmarks.replay.replay_traces([trace], **sizes)
    path = benchmarks.make_store.write_store(tmp_path / "store", geometry, Recipe.parse(recipe), replay=replay)
    with benchmarks.common.in_process(path) as runner:
        for first in (20, _TOKENS + 30):
            before = np.array(runner.stats().tokens_per_expert)
            request = GenerationRequest(str(first), tuple(range(first, first + 24)), 40)
            ids = [token for event in runner.stream(request) for token in event.token_ids]
            assert ids == list(range(first + 24, first + 64))
            counts = np.array(runner.stats().tokens_per_expert) - before
            rows = replay.chosen_TLK[first : first + 63]  # the last token is not computed
            expected = [np.bincount(rows[:, layer].ravel(), minlength=geometry.experts) for layer in range(4)]
            assert np.array_equal(counts, expected)


@pytest.mark.parametrize("kind", ["Q4_0", "BF16", "F16", "F32"])
def test_a_gguf_file_has_the_same_planted_values(
    benchmarks: SimpleNamespace, trace: SimpleNamespace, kind: str
) -> None:
    replay = benchmarks.replay.replay_traces([trace], tokens=400, layers=4, experts=8, active=2)
    planted = benchmarks.planted.Planted(replay, 256)
    tensor = benchmarks.gguf_file.GgufTensor("token_embd.weight", (400, 256), kind)
    random = benchmarks.make_gguf.RandomTensors(0)
    data = b"".join(random.planted(tensor, planted.embedding, benchmarks.planted.UNIT, is_random=True))
    assert len(data) == tensor.num_bytes
    values = _decode(np.frombuffer(data, dtype=np.uint8), kind).reshape(400, 256)
    assert np.array_equal(values[:, : planted.num_dims], planted.embedding(0, 400) * benchmarks.planted.UNIT)
    assert values[:, planted.num_dims :].std() == pytest.approx(1, rel=0.05)
    down = benchmarks.gguf_file.GgufTensor("blk.0.ffn_down_exps.weight", (2, 256, 64), kind)
    rows = _decode(np.frombuffer(b"".join(random.with_zero_rows(down, 64)), dtype=np.uint8), kind).reshape(2, 256, 64)
    assert not rows[:, :64].any() and rows[:, 64:].any(axis=2).all()


def _decode(data: np.ndarray, kind: str) -> np.ndarray:
    """As gguf defines the types."""
    if kind == "Q4_0":
        blocks = data.reshape(-1, 18)
        codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32) - 8
        return codes * blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(np.float16 if kind == "F16" else np.float32).astype(np.float32)


def test_too_many_layers_for_the_hidden_size_are_refused(benchmarks: SimpleNamespace) -> None:
    replay = benchmarks.replay.replay_random(tokens=64, layers=48, experts=128, active=8)
    with pytest.raises(SystemExit, match="hidden 2048 is too small"):
        benchmarks.planted.Planted(replay, 2048)


def test_recorded_traces_are_read(benchmarks: SimpleNamespace) -> None:
    files = sorted((Path(__file__).parents[1] / "data/traces").glob("*.msgpack"))
    traces = benchmarks.routing.read_traces(files)
    assert len(traces) >= 3
    for trace in traces:
        assert trace.experts == 8 and trace.chosen_TLK.shape[1:] == (6, 2) and trace.chosen_TLK.min() >= 0
        right = (trace.predicted[1][:, 1:, :, None] == trace.chosen_TLK[:, 1:, None]).any(axis=2).mean()
        assert 0.6 < right < 0.95


@pytest.mark.parametrize("size", [0, 4096, 12345, (16 << 20) + 7])
def test_direct_files_hold_what_was_written(benchmarks: SimpleNamespace, tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    with benchmarks.direct_file.DirectWriter(tmp_path / "file") as file:
        for part in np.array_split(data, 3):
            file.write(part)
        file.write(b"end")
        assert file.tell() == size + 3
    assert (tmp_path / "file").read_bytes() == data.tobytes() + b"end"


def test_raw_bandwidth_reads_past_the_page_cache(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 << 20))
    path.read_bytes()
    if benchmarks.disk.cached_share([path]) < 1:
        pytest.skip("this file system or kernel does not keep what was just read")
    found = benchmarks.disk.raw_bandwidth([path], 2 << 20, 0.02, rounds=2, pieces=(1 << 20, 4 << 20), depths=(1, 2))
    assert found.cached == 0 and found.bytes_per_s > 0
    assert [(rate.piece_bytes, rate.depth) for rate in found.rates] == [
        (size << 20, depth) for size in (1, 2) for depth in (1, 2)  # a read of 2 MiB has no piece of 4
    ]  # fmt: skip

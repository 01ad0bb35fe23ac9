"""One forward pass for tokens of several sequences: the bits of single steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.attention import Attention
from helpers.batches import Sequences
from helpers.capped import capped
from helpers.reference import runner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moray.runtime.kernels import ops_fused
from moray.runtime.kernels.pool import Pool
from moray.runtime.model.batch import cache_kind_of, make_batch_forward
from moray.runtime.store.store import Store

SHAPES = [(1, 1, 16, 16), (8, 2, 32, 32), (6, 3, 80, 40), (14, 2, 64, 64)]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 3)), min_size=1, max_size=9),
    st.sampled_from(SHAPES),
    st.booleans(),
    st.booleans(),
)
def test_rows_of_attention_have_the_bits_of_single_tokens(
    sequences: list[tuple[int, int]], shape: tuple[int, int, int, int], is_layer: bool, has_parts: bool
) -> None:
    """``sequences``: tokens in a cache, and rows that it gets."""
    heads, kv_heads, dim, rotary = shape
    made = Attention(heads, kv_heads, dim, 48, rotary=rotary, has_norms=has_parts, has_biases=has_parts)
    mine = [torch.randn(2, kv_heads, before + count + 5, dim) for before, count in sequences]
    its = [cache.clone() for cache in mine]
    lengths = [(i, before + k + 1) for i, (before, count) in enumerate(sequences) for k in range(count)]
    x = torch.randn(len(lengths), 48)
    got = made.batched(x, [(mine[i], length) for i, length in lengths], is_layer)
    wanted = [made.fused(x[row : row + 1], *its[i][:, :, :length], is_layer) for row, (i, length) in enumerate(lengths)]
    for batched, single in zip(got, zip(*wanted, strict=True), strict=True):
        assert torch.equal(batched, torch.cat(single))
    assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def test_rows_have_the_same_bits_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = Attention(8, 2, 64, 512), torch.randn(5, 512)
    caches = [(torch.randn(2, 2, 900, 64), length) for length in (3, 900, 77, 512, 16)]
    results = []
    for count in (1, 2, 5):
        pool = Pool(count)
        monkeypatch.setattr(ops_fused, "current_pool", lambda pool=pool: pool)
        results.append(torch.cat(made.batched(x, caches, is_layer=True), dim=1))
        pool.close()
    assert all(torch.equal(result, results[0]) for result in results)


STEP = st.lists(st.integers(0, 100), min_size=1, max_size=9)  # picks among the sequences that are there
JOINS = st.lists(st.one_of(st.integers(1, 12), st.integers(250, 270)), max_size=3)
SCHEDULE = st.lists(st.tuples(JOINS, st.integers(0, 9), STEP), min_size=1, max_size=5)


@pytest.mark.parametrize("recipe", ["hqq4:32", "none"])
def test_batches_have_the_bits_of_single_steps(recipe: str, store: Callable[..., Path]) -> None:
    """Sequences of any lengths join, leave, and get one token or several in any order."""
    with runner(store("qwen3_moe", recipe), "int8") as made:
        batch = make_batch_forward(made.model, cache_kind_of(made.model))
        assert batch is not None and batch.kind == "fused" and batch.takes_runs

        @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
        @given(SCHEDULE, st.integers(0, 1000))
        @torch.inference_mode()
        def follow(schedule: list[tuple[list[int], int, list[int]]], seed: int) -> None:
            sequences = Sequences(made.model, batch, seed)
            for joining, leaving, picks in schedule:
                if leaving < len(sequences.caches):
                    sequences.leave(leaving)
                for length in joining or ([] if sequences.caches else [4]):
                    sequences.join(length)
                got, wanted = sequences.step([pick % len(sequences.caches) for pick in picks])
                assert torch.equal(got, wanted)
            for mine, its in sequences.caches:
                for a, b in zip(mine.layers, its.layers, strict=True):
                    assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)

        follow()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@torch.inference_mode()
def test_each_layer_is_one_call_of_the_experts(family: str, store: Callable[..., Path]) -> None:
    """And each expert is counted once, however many rows chose it."""
    with runner(store(family, "hqq4:32"), "int8") as made:
        batch = make_batch_forward(made.model, cache_kind_of(made.model))
        assert batch is not None and batch.kind == "fused"
        sequences, rows = Sequences(made.model, batch), [0, 1, 2, 3, 4, 5]
        for length in (3, 9, 4, 1, 7, 5):
            sequences.join(length)
        num_layers = len(made.stats().tokens_per_expert)
        before = made.stats()
        tokens = [11, 12, 13, 14, 15, 16]
        batch(tokens, [sequences.caches[row][0] for row in rows])
        after = made.stats()
        assert after.layer_calls - before.layer_calls == num_layers
        tokens_per_expert = np.array(after.tokens_per_expert) - np.array(before.tokens_per_expert)
        assert after.uses - before.uses == np.count_nonzero(tokens_per_expert)
        assert (tokens_per_expert.sum(axis=1) == 2 * len(rows)).all()


@torch.inference_mode()
def test_experts_that_are_missing_are_loaded_once_for_the_batch(store: Callable[..., Path]) -> None:
    with Store.open(store("mixtral", "hqq4:32")) as opened:
        num_experts = len(opened.manifest.shards)
        with capped(opened, num_experts) as whole, capped(opened, 4) as cut:
            wanted_batch, batch = (
                make_batch_forward(c.runner.model, cache_kind_of(c.runner.model)) for c in (whole, cut)
            )
            assert wanted_batch is not None and batch is not None and batch.kind == "fused"
            wanted, got = (Sequences(c.runner.model, b) for c, b in ((whole, wanted_batch), (cut, batch)))
            for length in (3, 12, 5, 260, 8):
                wanted.join(length)
                got.join(length)
            before = cut.source.stats()
            misses, uses = before.misses, cut.runner.stats().uses
            for rows in ([0, 1, 2, 3, 4], [3], [4, 2, 2, 0], [1, 1, 3, 4, 0, 2]):
                expected, expected_alone = wanted.step(rows)
                tokens = wanted.tokens
                assert torch.equal(expected, expected_alone)
                assert torch.equal(batch(tokens, [got.caches[row][0] for row in rows]), expected)
            assert misses < cut.source.stats().misses <= misses + cut.runner.stats().uses - uses


@torch.inference_mode()
def test_rotations_that_depend_on_the_length_are_each_rows_own(tmp_path: Path, store: Callable[..., Path]) -> None:
    path = shutil.copytree(store("qwen3_moe", "hqq4:32"), tmp_path / "store")
    config = json.loads((path / "config.json").read_text())
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    config["rope_parameters"] |= factors | {"rope_type": "longrope", "original_max_position_embeddings": 32}
    (path / "config.json").write_text(json.dumps(config))
    with runner(path, "int8") as made:
        batch = make_batch_forward(made.model, cache_kind_of(made.model))
        assert batch is not None and batch.kind == "fused"
        sequences = Sequences(made.model, batch)
        for length in (5, 40, 30):  # the last one grows beyond 32
            sequences.join(length)
        for _ in range(6):
            got, wanted = sequences.step([0, 1, 2])
            assert torch.equal(got, wanted)


@torch.inference_mode()
def test_a_padded_batch_takes_each_sequence_once(store: Callable[..., Path]) -> None:
    with runner(store("olmoe", "hqq4:32"), "int8") as made:
        batch = make_batch_forward(made.model, cache_kind_of(made.model))
        assert batch is not None and batch.kind == "padded" and not batch.takes_runs
        sequences = Sequences(made.model, batch)
        sequences.join(4)
        with pytest.raises(AssertionError, match="one row"):
            sequences.step([0, 0])

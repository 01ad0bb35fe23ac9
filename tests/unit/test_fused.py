"""Caches that grow in place, routing and whole MoE blocks in one launch, against torch and against the parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.attention import plain
from helpers.reference import runner
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig
from transformers.cache_utils import DynamicLayer

from moray.runtime.kernels import router
from moray.runtime.kernels.ops import MatrixKernel
from moray.runtime.kernels.ops_fused import route_at
from moray.runtime.model.kv_layer import GrowingLayer, new_cache
from moray.runtime.model.layer_modules import FusedBlock

# ----------------------------------------------------------------------------------------- cache


def test_a_growing_layer_holds_what_a_stock_one_holds() -> None:
    mine, its = GrowingLayer(), DynamicLayer()  # type: ignore[no-untyped-call]
    for count in (1, 5, 1, 250, 1, 1, 400, 3):
        new = torch.randn(2, 1, 2, count, 8)
        for a, b in zip(mine.update(*new), its.update(*new), strict=True):
            assert torch.equal(a, b)
        assert mine.get_seq_length() == its.get_seq_length()
    for layer in (mine, its):
        layer.crop(-100)
    new = torch.randn(2, 1, 2, 2, 8)
    for a, b in zip(mine.update(*new), its.update(*new), strict=True):
        assert torch.equal(a, b)
    mine.reset()
    assert mine.get_seq_length() == 0
    assert torch.equal(mine.update(*new)[0], new[0])


def test_appending_a_token_does_not_copy_the_others() -> None:
    layer = GrowingLayer()  # type: ignore[no-untyped-call]
    layer.update(*torch.randn(2, 1, 2, 5, 8))
    places = {layer.update(*torch.randn(2, 1, 2, 1, 8))[0].data_ptr() for _ in range(200)}
    assert len(places) == 1


def test_only_layers_that_keep_everything_grow_in_place() -> None:
    config = MixtralConfig(sliding_window=16, num_hidden_layers=2)
    assert not any(isinstance(layer, GrowingLayer) for layer in new_cache(config).layers)
    assert all(isinstance(layer, GrowingLayer) for layer in new_cache(MixtralConfig(num_hidden_layers=2)).layers)


# --------------------------------------------------------------------------------------- routing


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([router.PROBABILITIES, router.NORMALIZED, router.OF_BEST]),
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 20),
    st.booleans(),
)
def test_routing_is_torchs(kind: int, experts: int, top_k: int, tokens: int, has_bias: bool) -> None:
    top_k = min(top_k, experts)
    torch.manual_seed(experts + tokens)
    weight, x, bias = torch.randn(experts, 24), torch.randn(tokens, 24), torch.randn(experts)
    packed, spec = plain(weight)
    logits, weights = torch.empty(tokens, experts), torch.empty(tokens, top_k)
    ids = torch.empty(tokens, top_k, dtype=torch.int64)
    out = (logits.data_ptr(), ids.data_ptr(), weights.data_ptr())
    kernel = MatrixKernel.of(spec, "float")
    route_at(kernel, packed.data_ptr(), bias.data_ptr() if has_bias else 0, kind, x.data_ptr(), tokens, top_k, out)
    expected = x @ weight.T + (bias if has_bias else 0)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    best, wanted_ids = logits.topk(top_k)  # of the same logits: near ties would fall otherwise in torch's
    assert torch.equal(ids, wanted_ids)
    if kind == router.OF_BEST:
        wanted = best.softmax(-1)
    else:
        wanted = logits.softmax(-1).gather(1, ids)
        wanted = wanted / wanted.sum(-1, keepdim=True) if kind == router.NORMALIZED else wanted
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-7)


def test_among_equals_the_lowest_expert_is_chosen() -> None:
    packed, spec = plain(torch.zeros(6, 24))
    logits, weights, ids = torch.empty(1, 6), torch.empty(1, 3), torch.empty(1, 3, dtype=torch.int64)
    out = (logits.data_ptr(), ids.data_ptr(), weights.data_ptr())
    route_at(MatrixKernel.of(spec, "float"), packed.data_ptr(), 0, 1, torch.ones(24).data_ptr(), 1, 3, out)
    assert ids.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3))


# ---------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("recipe", ["none", "hqq4:32"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_block_in_one_call_has_the_bits_of_its_parts(recipe: str, tokens: int, store: Callable[..., Path]) -> None:
    with runner(store("mixtral", recipe), "int8") as made, torch.inference_mode():
        blocks = [module for module in made.model.modules() if isinstance(vars(module).get("forward"), FusedBlock)]
        assert len(blocks) == len(made.stats().tokens_per_expert)
        before = made.stats()
        for block in blocks:
            x = torch.randn(1, tokens, block.experts.hidden_dim)
            fused = block(x)
            middle = made.stats()
            used, size = block.experts.moray._used, block.experts.num_experts
            assert used[1 : 1 + used[0]].tolist() == np.unique(block.gate(x)[-1]).tolist()
            assert used[1 + size : 1 + size + used[0]].sum() == 2 * tokens
            assert torch.equal(fused, type(block).forward(block, x))
        after = made.stats()
    counts = [np.array(stats.tokens_per_expert) for stats in (before, after)]
    assert counts[1].sum() - counts[0].sum() == 2 * 2 * tokens * len(blocks)
    assert after.uses - before.uses == 2 * np.count_nonzero(counts[1] - counts[0])
    assert middle.layer_calls - before.layer_calls == 2 * len(blocks) - 1
    assert after.compute_s > before.compute_s and after.bytes_by_source != before.bytes_by_source


def test_a_block_whose_experts_have_moved_fetches_them(store: Callable[..., Path]) -> None:
    with runner(store("mixtral", "none"), "int8") as made, torch.inference_mode():
        block: Any = next(m for m in made.model.modules() if isinstance(vars(m).get("forward"), FusedBlock))
        binding, x = block.experts.moray, torch.randn(1, 2, block.experts.hidden_dim)
        expected, before = block(x), made.stats()
        table = binding.source.table(binding.layer)
        moved = type(table).fixed(table.addresses, table.counters, table.generations + 2)
        asked: list[int] = []
        fetch = binding.source.fetch
        binding.source.table = lambda layer: moved
        binding.source.fetch = lambda layer, experts: (asked.append(layer), fetch(layer, experts))[1]
        assert torch.equal(block(x), expected)
        assert asked == [binding.layer]
        assert made.stats().layer_calls == before.layer_calls + 1  # what was thrown away is not counted

"""Attention of one token, routing and whole MoE blocks in one launch, against torch and against the parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.reference import runner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.cache_utils import DynamicLayer

from moray.runtime.kernels import attention, ops_fused, router
from moray.runtime.kernels.ops import MatrixKernel
from moray.runtime.kernels.ops_fused import AttentionKernel, attention_at, route_at
from moray.runtime.kernels.pool import Pool
from moray.runtime.layout.packed import PackedSpec, pack_plain
from moray.runtime.model.kv_layer import GrowingLayer, new_cache
from moray.runtime.model.layer_modules import FusedBlock

Tensor = torch.Tensor

# ------------------------------------------------------------------------------------- attention


def plain(matrix: Tensor) -> tuple[Tensor, PackedSpec]:
    spec = PackedSpec(*matrix.shape, "f32")
    return torch.from_numpy(pack_plain(matrix.numpy(), spec)), spec


class Attention:
    """A random layer's attention in float32, and the same in torch."""

    def __init__(self, heads: int, kv_heads: int, dim: int, columns: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        sizes = (heads, kv_heads, kv_heads)
        self.weights = [torch.randn(n * dim, columns) / columns**0.5 for n in sizes]
        self.biases = [torch.randn(n * dim) for n in sizes]
        self.norms = [torch.randn(dim) for _ in range(2)]
        self.output = torch.randn(columns, heads * dim) / (heads * dim) ** 0.5
        self.around = [torch.randn(columns) for _ in range(2)]
        self._packed = [plain(w)[0] for w in self.weights]
        self._packed_output, output_spec = plain(self.output)
        fields = np.zeros(attention.NUM_FIELDS, dtype=np.int64)
        fields[:5] = heads, kv_heads, dim, bits(dim**-0.5), bits(1e-6)
        fields[5:7] = [norm.data_ptr() for norm in self.norms]
        fields[7:10] = [bias.data_ptr() for bias in self.biases]
        part = PackedSpec(kv_heads * dim, columns, "f32")
        queries = [self._packed[0].data_ptr() + part.num_bytes * i for i in range(heads // kv_heads)]
        parts = np.array([*queries, *(packed.data_ptr() for packed in self._packed[1:])], dtype=np.int64)
        kernels = (MatrixKernel.of(spec, "float") for spec in (part, output_spec))
        self.kernel = AttentionKernel(fields, next(kernels), parts, next(kernels), self._packed_output.data_ptr())
        self.cosines, self.sines = torch.rand(dim), torch.rand(dim)

    def fused(self, x: Tensor, keys: Tensor, values: Tensor, is_layer: bool = False) -> list[Tensor]:
        """attended, y and z; the last of keys and values [V, N, D] is written."""
        out = [torch.empty(self.heads * self.dim), torch.empty_like(x), torch.empty_like(x)]
        norms = np.array([*(n.data_ptr() for n in self.around), bits(1e-5), bits(1e-6)]) if is_layer else None
        attention_at(
            self.kernel,
            x.data_ptr(),
            (self.cosines.data_ptr(), self.sines.data_ptr(), self.dim),
            (keys.data_ptr(), values.data_ptr(), 4 * keys.stride(0)),
            keys.shape[1],
            (out[0].data_ptr(), out[1].data_ptr(), out[2].data_ptr()),
            ops_fused.NO_NORMS if norms is None else norms,
        )
        return out

    def stock(self, x: Tensor, keys: Tensor, values: Tensor, is_layer: bool = False) -> list[Tensor]:
        residual = x
        if is_layer:
            x = F.rms_norm(x, x.shape, self.around[0], 1e-5)
        q, k, v = ((w @ x + b).view(-1, self.dim) for w, b in zip(self.weights, self.biases, strict=True))
        q, k = (F.rms_norm(h, (self.dim,), n, 1e-6) for h, n in zip((q, k), self.norms, strict=True))
        q, k = (h * self.cosines + turned(h) * self.sines for h in (q, k))
        keys[:, -1], values[:, -1] = k, v
        attended = F.scaled_dot_product_attention(q[None, :, None], keys[None], values[None], enable_gqa=True).flatten()
        y = self.output @ attended + (residual if is_layer else 0)
        return [attended, y, F.rms_norm(y, y.shape, self.around[1], 1e-6)]


def turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@pytest.mark.parametrize("is_layer", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 16), (8, 2, 32), (6, 3, 80), (4, 4, 128)])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 300])
def test_attention_of_one_token_is_torchs(heads: int, kv_heads: int, dim: int, length: int, is_layer: bool) -> None:
    made, x = Attention(heads, kv_heads, dim, 48), torch.randn(48)
    room = torch.randn(2, kv_heads, length + 5, dim)
    mine, its = (torch.clone(room) for _ in range(2))
    got = made.fused(x, *mine[:, :, :length], is_layer)
    wanted = made.stock(x, *its[:, :, :length], is_layer)
    for a, b in zip(got[: 3 if is_layer else 2], wanted, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    assert torch.equal(mine[:, :, length:], room[:, :, length:])  # nothing behind the new token is touched


def test_attention_has_the_same_bits_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x, cache = Attention(8, 2, 64, 512), torch.randn(512), torch.randn(2, 2, 700, 64)
    results = []
    for threads in (1, 2, 5):
        pool = Pool(threads)
        monkeypatch.setattr(ops_fused, "current_pool", lambda pool=pool: pool)
        results.append(torch.cat(made.fused(x, *cache, is_layer=True)))
        pool.close()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_visible(bad: float) -> None:
    made, cache = Attention(2, 1, 16, 32), torch.randn(2, 1, 20, 16)
    cache[0, 0, 3, 5] = bad
    assert made.fused(torch.randn(32), *cache)[0].isnan().any()


def test_large_scores_do_not_overflow() -> None:
    made, x, cache = Attention(2, 1, 16, 32), torch.randn(32), torch.randn(2, 1, 20, 16)
    cache[0] *= 1e6
    mine, its = cache.clone(), cache.clone()
    torch.testing.assert_close(made.fused(x, *mine)[0], made.stock(x, *its)[0], rtol=1e-4, atol=2e-5)


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
        moved = type(table)(table.addresses, table.counters, table.generations + 2)
        asked: list[int] = []
        fetch = binding.source.fetch
        binding.source.table = lambda layer: moved
        binding.source.fetch = lambda layer, experts: (asked.append(layer), fetch(layer, experts))[1]
        assert torch.equal(block(x), expected)
        assert asked == [binding.layer]
        assert made.stats().layer_calls == before.layer_calls + 1  # what was thrown away is not counted

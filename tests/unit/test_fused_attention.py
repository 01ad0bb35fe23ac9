"""Attention of one token and of prompts, one launch each, against torch in float64 and against one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.attention import Attention, attend, bits
from helpers.reference import runner, stock_logits, stock_model
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.runtime.kernels import attention_prompt, ops, ops_fused, programs
from moray.runtime.kernels.pool import Pool, run, run_alone
from moray.runtime.model import attention_modules
from moray.runtime.model.kv_layer import new_cache

Tensor = torch.Tensor
SHAPES = [(1, 1, 16), (8, 2, 32), (6, 3, 80), (4, 4, 128), (14, 2, 64), (20, 2, 48)]


@contextmanager
def threads(count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pool = Pool(count)
    monkeypatch.setattr(ops_fused, "current_pool", lambda: pool)
    yield
    pool.close()


@pytest.mark.parametrize("is_layer", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize(("tokens", "length"), [(1, n) for n in (1, 2, 15, 16, 17, 300)] + [(2, 2), (5, 90), (70, 270)])
def test_attention_is_torchs(heads: int, kv_heads: int, dim: int, tokens: int, length: int, is_layer: bool) -> None:
    made, x = Attention(heads, kv_heads, dim, 48), torch.randn(tokens, 48)
    room = torch.randn(2, kv_heads, length + 5, dim)
    mine, its = (torch.clone(room) for _ in range(2))
    got = made.fused(x, *mine[:, :, :length], is_layer)
    wanted = made.stock(x, *its[:, :, :length], is_layer)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    assert torch.equal(mine[:, :, length:], room[:, :, length:])  # nothing behind the new tokens is touched


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 40),
    st.integers(0, 60),
    st.sampled_from([(2, 1, 32, 16), (4, 2, 40, 40), (3, 3, 24, 8), (14, 2, 64, 64)]),
    st.booleans(),
    st.booleans(),
)
def test_parts_that_a_layer_lacks_are_left_out(
    tokens: int, before: int, shape: tuple[int, int, int, int], has_norms: bool, has_biases: bool
) -> None:
    heads, kv_heads, dim, rotary = shape
    made = Attention(heads, kv_heads, dim, 31, rotary=rotary, has_norms=has_norms, has_biases=has_biases)
    x, mine = torch.randn(tokens, 31), torch.randn(2, kv_heads, before + tokens, dim)
    its = mine.clone()
    for a, b in zip(made.fused(x, *mine), made.stock(x, *its), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def attend_tiles(queries: Tensor, keys: Tensor, values: Tensor, pool: Pool | None = None) -> Tensor:
    """The kernel alone, of prepared queries [T, H, D] over keys and values [V, N, D] with any distance of heads."""
    (tokens, heads, dim), (kv_heads, length, _) = queries.shape, keys.shape
    out = torch.full_like(queries, torch.nan)
    params = np.zeros(attention_prompt.NUM_PARAMS, dtype=np.int64)
    for field, value in {
        "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "SCALE": bits(dim**-0.5), "NUM_TOKENS": tokens,
        "LENGTH": length, "QUERIES": queries.data_ptr(), "KEYS": keys.data_ptr(), "VALUES": values.data_ptr(),
        "HEAD_BYTES": 4 * keys.stride(0), "ATTENDED": out.data_ptr(),
    }.items():  # fmt: skip
        params[getattr(attention_prompt, field)] = value
    items = attention_prompt.num_attend_items(params, tokens)
    phases = np.array([[ops.FUNCTIONS[programs.F_ATTEND_TILES], params.ctypes.data, items, 1]])
    if pool is None:
        run_alone(phases)
    else:
        run(pool.address, phases)
    return out


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(0, 200),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([1, 15, 16, 32, 40, 64, 72, 80, 96, 100, 128, 129, 192, 256]),
    st.sampled_from([0.1, 1.0, 30.0]),
)
def test_scores_softmax_and_mixing_are_exact_to_float32(
    tokens: int, before: int, kv_heads: int, group: int, dim: int, size: float
) -> None:
    torch.manual_seed(tokens * before + dim)
    length = before + tokens
    queries = size * torch.randn(tokens, kv_heads * group, dim)
    # What lies behind the last token is not read, even where keys are taken by eights.
    room = torch.full((2, kv_heads, length + 9, dim), torch.nan)
    room[:, :, :length] = torch.randn(2, kv_heads, length, dim)
    keys, values = room[:, :, :length]
    wanted = attend(queries.double(), keys.double(), values.double()).float()
    # A score of size s is off by about s * 2**-24 * sqrt(D), and its exponential by as much.
    tolerance = 3e-6 + 1e-6 * size * dim**0.5
    torch.testing.assert_close(attend_tiles(queries, keys, values), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("heads", [8, 14, 20])
def test_attention_has_the_same_bits_with_any_number_of_threads(
    tokens: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one token, threads also decide how many heads that share keys are computed together."""
    made, x, cache = Attention(heads, 2, 64, 512), torch.randn(tokens, 512), torch.randn(2, 2, 700, 64)
    results = []
    for count in (1, 2, 5, 9, 2):
        with threads(count, monkeypatch):
            results.append(torch.cat(made.fused(x, *cache, is_layer=True), dim=1))
    assert all(torch.equal(result, results[0]) for result in results)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 130), st.lists(st.integers(2, 40), min_size=2, max_size=6), st.sampled_from(SHAPES))
def test_a_prompt_in_parts_has_the_bits_of_the_whole(
    before: int, parts: list[int], shape: tuple[int, int, int]
) -> None:
    heads, kv_heads, dim = shape
    made, tokens = Attention(heads, kv_heads, dim, 48), sum(parts)
    x, whole = torch.randn(tokens, 48), torch.randn(2, kv_heads, before + tokens, dim)
    cut, results, first = whole.clone(), [], 0
    wanted = made.fused(x, *whole, is_layer=True)
    for part in parts:
        end = first + part
        results.append(made.fused(x[first:end], *cut[:, :, : before + end], is_layer=True))
        first = end
    for part_of_all, result in zip(wanted, zip(*results, strict=True), strict=True):
        assert torch.equal(part_of_all, torch.cat(result))
    assert torch.equal(cut, whole)


def test_the_last_token_of_a_prompt_is_like_one_alone() -> None:
    made, x, whole = Attention(8, 2, 32, 48), torch.randn(50, 48), torch.randn(2, 2, 150, 32)
    cut = whole.clone()
    wanted = made.fused(x, *whole, is_layer=True)
    made.fused(x[:-1], *cut[:, :, :-1], is_layer=True)
    for a, b in zip(made.fused(x[-1:], *cut, is_layer=True), wanted, strict=True):
        torch.testing.assert_close(a, b[-1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_visible(bad: float, tokens: int) -> None:
    made, cache = Attention(2, 1, 16, 32), torch.randn(2, 1, 90, 16)
    cache[0, 0, 3, 5] = bad
    attended = made.fused(torch.randn(tokens, 32), *cache)[0]
    assert attended.isnan().any(dim=1).all()


@pytest.mark.parametrize("tokens", [1, 12])
def test_large_scores_do_not_overflow(tokens: int) -> None:
    made, x, cache = Attention(2, 1, 16, 32), torch.randn(tokens, 32), torch.randn(2, 1, 90, 16)
    cache[0, :, :-tokens] *= 1e6
    mine, its = cache.clone(), cache.clone()
    torch.testing.assert_close(made.fused(x, *mine)[0], made.stock(x, *its)[0], rtol=1e-4, atol=2e-5)


# -------------------------------------------------------------------------------------- in models


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each launch for a prompt."""
    made: list[int] = []

    def counted(*args: Any) -> None:
        made.append(args[-1])
        ops_fused.prompt_attention_at(*args)

    monkeypatch.setattr(attention_modules, "prompt_attention_at", counted)
    return made


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "phimoe", "glm4_moe"])
@torch.inference_mode()
def test_a_models_prompts_equal_transformers(
    family: str, checkpoint: Callable[[str], Path], store: Callable[..., Path], calls: list[int]
) -> None:
    """Whole, in parts and with single tokens between them: logits of every token over a cache."""
    ids = [3 + (7 * i * i) % 180 for i in range(60)]
    wanted = stock_logits(stock_model(checkpoint(family)), ids)
    with runner(store(family, "none"), "float") as made:
        for parts in ((60,), (40, 2, 1, 1, 16), (1, 30, 29)):
            calls.clear()
            cache, logits = new_cache(made.model.config.get_text_config()), []
            for part in parts:
                first = cache.get_seq_length()
                step = torch.tensor([ids[first : first + part]])
                logits.append(made.model(input_ids=step, past_key_values=cache, use_cache=True).logits[0])
            assert (torch.cat(logits) - wanted).abs().max() < 1e-5
            assert calls == [part for part in parts if part > 1 for _ in cache.layers]


@torch.inference_mode()
def test_a_mask_that_hides_more_is_left_to_the_module(
    checkpoint: Callable[[str], Path], store: Callable[..., Path], calls: list[int]
) -> None:
    ids, mask = torch.tensor([[0, 0, 0, 5, 9, 77, 31]]), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    wanted = stock_model(checkpoint("mixtral"))(input_ids=ids, attention_mask=mask).logits[0, 3:]
    with runner(store("mixtral", "none"), "float") as made:
        calls.clear()  # what was tried while loading
        cache = new_cache(made.model.config)
        logits = made.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits[0, 3:]
        assert (logits - wanted).abs().max() < 1e-5
        assert not calls
        # And after a causal one of the same shape, which is remembered.
        made.model(input_ids=ids, past_key_values=new_cache(made.model.config), use_cache=True)
        assert calls


def test_causal_masks_are_told_from_others() -> None:
    causal = torch.ones(3, 8, dtype=torch.bool).tril(5)[None, None]
    window = causal & torch.ones(3, 8, dtype=torch.bool).triu(2)
    assert attention_modules._is_causal(causal, 3, 8) and attention_modules._is_causal(causal, 3, 8)
    assert not attention_modules._is_causal(window, 3, 8)
    assert not attention_modules._is_causal(causal.float(), 3, 8)
    assert not attention_modules._is_causal(causal.expand(2, 1, 3, 8), 3, 8)
    assert not attention_modules._is_causal(causal, 3, 9)
    assert attention_modules._is_causal(causal.clone(), 3, 8)

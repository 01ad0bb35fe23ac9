"""Scores, softmax and mixing of a prompt: moray's kernel against torch's scaled_dot_product_attention, float32.

    python benchmarks/prompt_attention.py                # a minute

Both get the same prepared queries [T, H, D] and a cache with N tokens, causal, in one process in turn. *ms*: the least
of ``--repeats`` calls and, in brackets, the median; torch with one thread and with as many as the kernels have. On a
busy machine medians are of the machine: OpenMP's threads look out for work after a call, and so do the kernels'.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from statistics import median
from time import perf_counter, sleep

import numpy as np
import torch
from common import describe_machine, print_table
from torch.nn import functional as F

from moray.runtime.kernels import attention_prompt as kernels
from moray.runtime.kernels.ops import FUNCTIONS
from moray.runtime.kernels.pool import current_pool, run
from moray.runtime.kernels.programs import F_ATTEND_TILES

_MODELS = {"Qwen3-30B-A3B": (32, 4, 128), "Mixtral-8x7B": (32, 8, 128), "Qwen1.5-MoE-A2.7B": (16, 16, 128)}  # H, V, D
_SHAPES = ((16, 16), (64, 64), (64, 512), (512, 512), (512, 4096))  # T, N


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[T, H, D] of queries [T, H, D] over keys and values [V, N, D]."""
    (tokens, heads, dim), (kv_heads, length, _) = queries.shape, keys.shape
    out, params = torch.empty_like(queries), np.zeros(kernels.NUM_PARAMS, dtype=np.int64)
    for field, value in (
        (kernels.HEADS, heads), (kernels.KV_HEADS, kv_heads), (kernels.DIM, dim), (kernels.NUM_TOKENS, tokens),
        (kernels.SCALE, int(np.float32(dim**-0.5).view(np.int32))), (kernels.LENGTH, length),
        (kernels.QUERIES, queries.data_ptr()), (kernels.KEYS, keys.data_ptr()), (kernels.VALUES, values.data_ptr()),
        (kernels.HEAD_BYTES, 4 * keys.stride(0)), (kernels.ATTENDED, out.data_ptr()),
    ):  # fmt: skip
        params[field] = value
    items = kernels.num_attend_items(params, tokens)
    run(current_pool().address, np.array([[FUNCTIONS[F_ATTEND_TILES], params.ctypes.data, items, 1]]))
    return out


def stock(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    q = queries.transpose(0, 1)[None]
    attended = F.scaled_dot_product_attention(
        q, keys[None], values[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return attended[0].transpose(0, 1)


def timed(function: Callable[[], object]) -> float:
    sleep(0.005)  # until the threads of the call before sleep
    function()  # and those of this one are awake
    started = perf_counter()
    function()
    return 1e3 * (perf_counter() - started)


def measure(heads: int, kv_heads: int, dim: int, tokens: int, length: int, repeats: int) -> tuple[str, ...]:
    queries, threads = torch.randn(tokens, heads, dim), len(os.sched_getaffinity(0))
    keys, values = torch.randn(2, kv_heads, length + length // 4, dim)[:, :, :length]
    mask = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens) if tokens < length else None
    difference = (attend(queries, keys, values) - stock(queries, keys, values, mask)).abs().max().item()
    assert difference < 1e-5, difference
    times: dict[int, list[float]] = {0: [], 1: [], threads: []}  # by torch's threads; 0: the kernel
    for _ in range(repeats):
        for count, values_ms in times.items():
            torch.set_num_threads(count or 1)
            call = (lambda: stock(queries, keys, values, mask)) if count else (lambda: attend(queries, keys, values))
            values_ms.append(timed(call))
    mine, one, many = (f"{min(times[n]):.2f} ({median(times[n]):.2f})" for n in (0, 1, threads))
    ratios = "-".join(f"{min(times[n]) / min(times[0]):.1f}" for n in sorted({1, threads}, reverse=True))
    return f"{tokens}", f"{length}", mine, one, many, ratios


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    print(describe_machine())
    rows = []
    for name, shape in _MODELS.items():
        rows += [(name, *measure(*shape, *lengths, arguments.repeats)) for lengths in _SHAPES]
    print_table(("heads of", "T", "N", "moray, ms", "torch, 1 thread", "torch, all threads", "torch / moray"), rows)


if __name__ == "__main__":
    main()

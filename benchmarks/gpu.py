"""The model on a CUDA device: tokens/s of the demonstration store, and the speed of its kernels.

Needs no Ray and no installation, and also runs beside other versions of torch (2.8 or newer) and transformers (5.17 or
newer) than moray pins. From the repository's root, on a machine with torch, transformers, numba, msgpack, psutil and
xxhash:

    PYTHONPATH=src HF_HUB_OFFLINE=1 python3 benchmarks/gpu.py

`--device cpu` tries it out where there is no GPU; `--store` measures another store.

What it measures:
- one matrix of 14336 x 4096 (a Mixtral-8x7B projection), eight copies of it in turn so that no cache holds it, by the
  device's own time: 16 calls in one CUDA graph, median of 20 replays after 3.
  *dequantize*, to bfloat16: *GB/s* are packed bytes read plus bfloat16 bytes written, a second; *x copy* is the ratio
  to a device-to-device copy of as many bytes, counted likewise; *by torch*: GB/s of plain torch operations.
  *1 token*, *8*, *16*: ``PackedLinear`` with so many, in us, and for one token its packed GB/s and their ratio to the
  copy; *call*: us of one call with a synchronization after it. *bf16, by torch* is torch's product with the bfloat16
  matrix.
- *tokens/s*: a ``Runner`` with its experts in this process's memory and a cache on the device for all, a half and a
  quarter of them, lanes chosen by the cost model; then without a cache hit (one slot, every shard copied at each use)
  and with all experts on the CPU; batch 1, greedy, a prompt of 64 tokens, 64 decode steps; medians of ``--rounds``
  rounds after one. prefill is 64 / seconds to the first token, decode 64 / seconds from the first to the 65th token.
  *hits* is the share of experts that were on the device. Beside it, the CPU's kernels in class int8.

benchmarks/gpu_lanes.py measures the lanes one by one.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from common import describe_machine, in_process, print_table

from moray.runtime.device.kernels import dequantize, why_not
from moray.runtime.generation.request import GenerationRequest
from moray.runtime.generation.runner import Runner
from moray.runtime.kernels import dequantize as plain
from moray.runtime.layout.packed import VECTOR_BYTES, PackedSpec
from moray.runtime.model.packed_modules import PackedLinear
from moray.runtime.store.store import Store

_ROWS, _COLUMNS = 14336, 4096
_SPECS = (
    PackedSpec(_ROWS, _COLUMNS, "q8", 64),
    PackedSpec(_ROWS, _COLUMNS, "q4", 64),
    PackedSpec(_ROWS, _COLUMNS, "q3", 64),
    PackedSpec(_ROWS, _COLUMNS, "q2", 16),
)
_COPIES, _CALLS = 8, 16
_TOKENS = 64
_DEMO = Path(__file__).parents[1] / "deploy" / "demo" / "store"


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Median of 20 calls after 3."""
    times = []
    for _ in range(23):
        _synchronize(device)
        started = perf_counter()
        work()
        _synchronize(device)
        times.append(perf_counter() - started)
    return median(times[3:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_packed(spec: PackedSpec, device: torch.device) -> torch.Tensor:
    """Valid packed bytes; every code is one, and every scale and zero is 1 (0x3C00 as float16)."""
    random = np.random.default_rng(0)
    packed = random.integers(0, 60, (spec.num_blocks, spec.block_bytes), dtype=np.uint8)
    meta = np.full(VECTOR_BYTES // 2, 0x3C00, dtype=np.uint16).view(np.uint8)
    packed[:, spec.code_bytes :] = np.tile(meta, spec.num_groups)
    return torch.from_numpy(packed.reshape(-1)).to(device)


def device_seconds(works: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Of one of 16 calls of the works in turn, without what launching them takes."""
    turns = [works[i % len(works)] for i in range(_CALLS)]
    for work in works:
        work()
    if device.type != "cuda":
        return seconds_of(lambda: [work() for work in turns], device) / _CALLS
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in turns:
            work()
    return seconds_of(graph.replay, device) / _CALLS


@torch.inference_mode()
def print_matrix(device: torch.device) -> None:
    rows = []
    dense = [torch.randn(_ROWS, _COLUMNS, device=device, dtype=torch.bfloat16) for _ in range(_COPIES)]
    plain_us = []
    for tokens in (1, 8, 16):
        x = torch.randn(tokens, _COLUMNS, device=device, dtype=torch.bfloat16)
        works = [partial(torch.nn.functional.linear, x, matrix) for matrix in dense]
        plain_us.append(f"{1e6 * device_seconds(works, device):.0f}")
    rows.append(("bf16, by torch", "-", "-", "-", plain_us[0], "-", "-", *plain_us[1:], "-"))
    del dense
    for spec in _SPECS:
        packed = [random_packed(spec, device) for _ in range(_COPIES)]
        moved = spec.num_bytes + 2 * _ROWS * _COLUMNS
        rate = moved / device_seconds([partial(dequantize, each, spec, torch.bfloat16) for each in packed], device)
        by_torch = moved / seconds_of(partial(plain.dequantize, packed[0], spec, torch.bfloat16), device)
        copy = torch.empty(_COPIES, moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(copy[0])
        copy_rate = moved / device_seconds([partial(target.copy_, each) for each in copy], device)
        cells = [f"{rate / 1e9:.1f}", f"{rate / copy_rate:.3f}", f"{by_torch / 1e9:.1f}"]
        cells += _linear_cells(packed, spec, copy_rate, device)
        rows.append((f"{spec.encoding} g{spec.group}", *cells))
    header = ("14336 x 4096", "dequantize, GB/s", "x copy", "by torch", "1 token, us", "packed GB/s", "x copy")
    print_table((*header, "8, us", "16, us", "call, us"), rows)


def _linear_cells(packed: list[torch.Tensor], spec: PackedSpec, copy_rate: float, device: torch.device) -> list[str]:
    if device.type == "cpu":  # there it would be another kernel
        return 6 * ["-"]
    linears, seconds = [PackedLinear(each, spec, None, "float") for each in packed], []
    for tokens in (1, 8, 16):
        x = torch.randn(tokens, _COLUMNS, device=device, dtype=torch.bfloat16)
        seconds.append(device_seconds([partial(linear, x) for linear in linears], device))
    rate = spec.num_bytes / seconds[0]
    call = seconds_of(partial(linears[0], x[:1]), device)
    one, eight, sixteen, called = (f"{1e6 * each:.0f}" for each in (*seconds, call))
    return [one, f"{rate / 1e9:.1f}", f"{rate / copy_rate:.3f}", eight, sixteen, called]


def measure_rates(runner: Runner, rounds: int) -> tuple[float, float]:
    """Medians of prefill and decode tokens/s."""
    found = [_measure_round(runner, index) for index in range(rounds + 1)][1:]
    return median(rates[0] for rates in found), median(rates[1] for rates in found)


def _measure_round(runner: Runner, index: int) -> tuple[float, float]:
    random = np.random.default_rng(index)
    prompt = (3 + index, *random.integers(3, 1024, _TOKENS - 1).tolist())  # no two begin alike: no KV cache is reused
    started, times = perf_counter(), []
    for _ in runner.stream(GenerationRequest(secrets.token_hex(8), prompt, _TOKENS + 1)):
        times.append(perf_counter())
    return _TOKENS / (times[0] - started), (len(times) - 1) / (times[-1] - times[0])


def print_rates(store: Path, device: torch.device, rounds: int) -> None:
    rows = []
    with Store.open(store) as opened:
        total = sum(layer.num_experts for layer in opened.manifest.layers)
    for slots, lanes in ((total, "auto"), (total // 2, "auto"), (total // 4, "auto"), (1, "device-copy"), (0, "auto")):
        with in_process(store, "float", str(device), slots=slots, lanes=lanes) as runner:
            dtype = str(next(runner.model.parameters()).dtype).removeprefix("torch.")
            prefill, decode = measure_rates(runner, rounds)
            stats = runner.device_stats()
        assert stats is not None
        hits = stats.uses_by_lane["device-hit"] / sum(stats.uses_by_lane.values())
        rows.append((f"{device}, {dtype}, {slots} slots, {lanes}", f"{decode:.1f}", f"{prefill:.1f}", f"{hits:.2f}"))
    with in_process(store, "int8") as runner:
        prefill, decode = measure_rates(runner, rounds)
        rows.append(("cpu, int8", f"{decode:.1f}", f"{prefill:.1f}", "-"))
    print_table((f"{store.parent.name}/{store.name}, tokens/s", "decode", "prefill", "hits"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--store", type=Path, default=_DEMO)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; run this on a machine with one, or try it out with --device cpu")
    print(describe_machine())
    print(f"device: {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}\n")
    reason = why_not(device) if device.type == "cuda" else None
    print(f"Triton kernels: {reason or ('used' if device.type == 'cuda' else 'not on the CPU')}\n")
    print_matrix(device)
    print()
    print_rates(arguments.store, device, arguments.rounds)


if __name__ == "__main__":
    main()

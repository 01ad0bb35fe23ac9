"""The device's Triton kernels in Triton's interpreter, on the CPU; and compiled for GPUs that are not here.

`make triton` installs Triton. tests/gpu runs the same kernels on a GPU.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.kernels import seeds
from helpers.matrices import BITS, random_matrix, specs
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.runtime.device import kernels as device_kernels
from moray.runtime.device.kernels import FEW, Pairs, TritonKernels
from moray.runtime.device.tier import DeviceTier
from moray.runtime.experts.function import ExpertsBinding
from moray.runtime.experts.source import InProcessSource
from moray.runtime.kernels import ops, reference
from moray.runtime.layout.packed import METAS, PackedSpec
from moray.runtime.model.families import expert_modules
from moray.runtime.model.loader import bind_experts, load_model
from moray.runtime.store.store import Store

pytest.importorskip("triton", reason="needs Triton: `make triton`")
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="tests/gpu runs them on this GPU")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels() -> TritonKernels:
    return TritonKernels(importlib.import_module("moray.runtime.device.triton_kernels"))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@settings(max_examples=40, deadline=None)
@given(specs(tuple(BITS), METAS), seeds)
def test_dequantized_weights_are_the_references(kernels: TritonKernels, spec: PackedSpec, seed: int) -> None:
    packed = random_matrix(spec, np.random.default_rng(seed))
    expected = torch.from_numpy(reference.dequantize(packed, spec))
    assert torch.equal(kernels.dequantize(torch.from_numpy(packed), spec, torch.float32), expected)
    assert torch.equal(kernels.dequantize(torch.from_numpy(packed), spec, torch.float16), expected.half())


@settings(max_examples=20, deadline=None)
@given(
    spec=specs(tuple(BITS), METAS),
    seed=seeds,
    counts=st.lists(st.integers(1, FEW), min_size=1, max_size=4),
    has_bias=st.booleans(),
)
def test_products_of_pairs_with_their_matrices(
    kernels: TritonKernels, spec: PackedSpec, seed: int, counts: list[int], has_bias: bool
) -> None:
    """Matrices behind one another, each behind 64 bytes of a shard's own, with its bias after it."""
    rng = np.random.default_rng(seed)
    matrices = [random_matrix(spec, rng) for _ in counts]
    biases = [rng.standard_normal(spec.rows).astype(np.float32) for _ in counts]
    size = 64 + spec.num_bytes + 64 * (-(-4 * spec.rows // 64))
    memory = np.zeros((len(counts), size), dtype=np.uint8)
    for shard, matrix, bias in zip(memory, matrices, biases, strict=True):
        shard[64 : 64 + spec.num_bytes] = matrix
        shard[64 + spec.num_bytes :][: bias.nbytes] = bias.view(np.uint8)
    num_pairs = sum(counts)
    x = torch.from_numpy(rng.standard_normal((5, spec.columns), dtype=np.float32)).half()
    x_rows, y_rows = rng.integers(0, 5, num_pairs).tolist(), rng.permutation(num_pairs).tolist()
    offsets = [size * i for i in range(len(counts))]
    pairs, (x_at, y_at) = Pairs.of(offsets, counts, CPU, x_rows, y_rows)
    y = torch.full((num_pairs, spec.rows), torch.nan)
    at = (64, 64 + spec.num_bytes if has_bias else None)
    kernels.matmul(torch.from_numpy(memory.reshape(-1)), spec, at, pairs, x, x_at, y, y_at)
    first = 0
    for matrix, bias, count in zip(matrices, biases, counts, strict=True):
        weights = torch.from_numpy(reference.dequantize(matrix, spec)).double()
        rows = x[x_rows[first : first + count]].double()
        expected, size = rows @ weights.T, rows.abs() @ weights.abs().T
        if has_bias:
            expected += torch.from_numpy(bias)
        found = y[y_rows[first : first + count]]
        assert ((found - expected).abs() <= 1e-5 * size + 1e-6 * expected.abs()).all()
        first += count


@pytest.mark.parametrize("counts", [[1], [3, 1], [9, 2, 16]])
def test_numbers_of_pairs_lie_where_triton_need_not_compile_again(counts: list[int]) -> None:
    rows = list(range(sum(counts)))
    pairs, found = Pairs.of([64 * i for i in range(len(counts))], counts, CPU, rows, rows[::-1])
    parts = [pairs.offsets, pairs.starts, pairs.counts, *found]
    assert {(part.data_ptr() - parts[0].data_ptr()) % 16 for part in parts} == {0}
    assert [part.tolist() for part in found] == [rows, rows[::-1]]
    expected = [
        (64 * i, start + j, min(8, counts[i] - j))
        for i, start in enumerate(np.cumsum([0, *counts[:-1]]))
        for j in range(0, counts[i], 8)
    ]
    assert list(zip(pairs.offsets.tolist(), pairs.starts.tolist(), pairs.counts.tolist(), strict=True)) == expected
    assert pairs.is_single == (counts == [1])


def test_a_pairs_bits_do_not_depend_on_other_matrices(kernels: TritonKernels) -> None:
    spec, rng = PackedSpec(48, 640, "q4", 64), np.random.default_rng(0)
    packed = torch.from_numpy(np.concatenate([random_matrix(spec, rng) for _ in range(3)]))
    x = torch.from_numpy(rng.standard_normal((6, spec.columns), dtype=np.float32)).half()

    def product(matrices: list[int], counts: list[int], rows: list[int]) -> torch.Tensor:
        pairs, (at, order) = Pairs.of([spec.num_bytes * m for m in matrices], counts, CPU, rows, list(range(len(rows))))
        y = torch.empty(len(rows), spec.rows)
        kernels.matmul(packed, spec, (0, None), pairs, x, at, y, order)
        return y

    together = product([0, 1, 2], [1, 3, 2], [0, 1, 2, 3, 4, 5])
    assert torch.equal(together[:1], product([0], [1], [0]))
    assert torch.equal(together[1:4], product([1], [3], [1, 2, 3]))
    assert torch.equal(together[4:], product([2], [2], [4, 5]))


@pytest.mark.parametrize("num_rows", [1, 3, FEW, FEW + 1])
def test_a_linear_layer(kernels: TritonKernels, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_kernels, "kernels_for", lambda device: kernels)
    spec, rng = PackedSpec(40, 128, "q4", 64), np.random.default_rng(0)
    packed = torch.from_numpy(random_matrix(spec, rng))
    x = torch.from_numpy(rng.standard_normal((1, num_rows, spec.columns), dtype=np.float32)).half()
    bias = torch.linspace(-1, 1, spec.rows).half()
    expected = x.float() @ torch.from_numpy(reference.dequantize(packed.numpy(), spec)).T + bias.float()
    found = device_kernels.linear(x, packed, spec, bias)
    assert found.dtype == torch.float16 and found.shape == expected.shape
    assert relative_error(found.float(), expected) < 2e-3


# ---------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("family", "recipe"), [("mixtral", "hqq4"), ("gpt_oss", "hqq3"), ("gemma4_text", "hqq4"), ("muse_spark", "hqq4")]
)
@torch.inference_mode()
def test_a_layers_experts_are_as_torch_computes_them(
    kernels: TritonKernels, family: str, recipe: str, store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases, gates of their own, norms after experts; hits, copies, and more tokens than a kernel takes."""
    with Store.open(store(family, recipe)) as opened, closing(InProcessSource(opened)) as source:
        model = load_model(opened, "float", CPU)
        bind_experts(model, opened, source, "float")
        tiers = [DeviceTier.of(opened.manifest, CPU, 8 * opened.manifest.slot_bytes, "device-copy") for _ in range(2)]
        module: Any = expert_modules(model)[0][1]
        for parameter in module.parameters():
            parameter.data = parameter.data.half()
        plain = make_device(module, tiers[0])
        monkeypatch.setattr("moray.runtime.device.compute.kernels_for", lambda device: kernels)
        packed = make_device(module, tiers[1])
        assert packed._on_device._kernels is kernels and plain._on_device._kernels is None
        for num_tokens in (1, FEW + 1, 1):  # of the second expert
            ids = torch.tensor([[1, 2 + i % 2] for i in range(num_tokens)])
            x, weights = torch.randn(num_tokens, module.moray._down.spec.rows).half(), torch.rand(num_tokens, 2)
            grouping = ops.group_by_expert(ids.numpy(), module.num_experts)
            _, lease = source.fetch(0, grouping.active).take()
            found, expected = (d.compute(module, x, weights, grouping, lease) for d in (packed, plain))
            assert relative_error(found.float(), expected.float()) < 5e-3
        assert packed._tier.stats().uses_by_lane["device-hit"] == 4
        # Of the first two calls the second dequantized: rates do not learn from it what decoding takes.
        assert [made._tier.stats().rates["device"].num_observations for made in (plain, packed)] == [2, 1]
        for tier in tiers:
            tier.close()


def make_device(module: Any, tier: DeviceTier) -> Any:
    binding: ExpertsBinding = module.moray
    return binding.use_device(tier)


# ------------------------------------------------------------------------------- where they do not run


def test_kernels_that_cannot_be_compiled_are_not_used_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> float:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(device_kernels, "probe", fail)
    with caplog.at_level(logging.WARNING):
        assert device_kernels._find_kernels.__wrapped__(CPU) is None
    assert "no Triton kernels on cpu" in caplog.text and "Failed to find C compiler" in caplog.text


def test_kernels_that_compute_something_else_are_not_used(
    kernels: TritonKernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert device_kernels._find_kernels.__wrapped__(CPU) is not None

    class Wrong(TritonKernels):
        def dequantize(self, packed: torch.Tensor, spec: PackedSpec, dtype: torch.dtype) -> torch.Tensor:
            return super().dequantize(packed, spec, dtype) * 1.5

    monkeypatch.setattr(device_kernels, "TritonKernels", Wrong)
    with caplog.at_level(logging.WARNING):
        assert device_kernels._find_kernels.__wrapped__(CPU) is None
    assert "was off by 0.5" in caplog.text


@pytest.mark.slow
def test_they_compile_for_gpus_from_turing_on(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "helpers" / "compile_triton.py"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, script, "75", "90"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 2 * 5 * 3
    assert all(int(line.split(": ")[1].split()[0]) <= 128 for line in lines), run.stdout  # half of a GPU's threads fit

"""The model on a CUDA device against the CPU's reference class.

Needs no Ray and no installation, and also runs beside other versions of torch (2.8 or newer) and transformers (5.17 or
newer) than moray pins. From the repository's root, on a machine with torch, transformers, numba, msgpack, psutil,
xxhash, pytest and pytest-timeout:

    PYTHONPATH=src HF_HUB_OFFLINE=1 python3 -m pytest tests/gpu -W ignore

Class gpu-*: the device's own floating point, bfloat16 activations, so results are compared within tolerances. The same
operations in bfloat16 on a CPU give, for the whole model: median relative error of a token's logits 0.004 to 0.006,
divergence up to 0.003 nats, 63 of 64 greedy tokens the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moray.runtime.arrays import Bytes
from moray.runtime.device import kernels
from moray.runtime.experts.meter import ExpertsStats
from moray.runtime.generation.request import GenerationRequest
from moray.runtime.generation.runner import Runner
from moray.runtime.kernels import reference
from moray.runtime.kernels.dequantize import dequantize, dequantize_rows
from moray.runtime.layout import second_level
from moray.runtime.layout.packed import PackedSpec, Quantized, pack_fp4, pack_plain, pack_quantized
from moray.runtime.model.packed_modules import PackedEmbedding, PackedLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is false"),
]

_ROOT = Path(__file__).parents[2]
_STORE = _ROOT / "deploy" / "demo" / "store"
_DEVICE = "cuda"
_PROMPTS = (
    "import os\nimport sys\n\n\ndef main(argv=None):\n",
    "class Parser:\n    def __init__(self, name, default=None):\n",
    "    for key, value in items:\n        if value is None:\n",
    'def read(path):\n    """Return the contents of a file."""\n    with open(path',
)
_SPECS = [
    PackedSpec(48, 128, "q8", 64),
    PackedSpec(48, 128, "q4", 64),
    PackedSpec(33, 192, "q4", 32),  # rows that do not fill a block
    PackedSpec(48, 128, "q3", 64),
    PackedSpec(20, 96, "q3", 32),
    PackedSpec(48, 128, "q2", 16),
    PackedSpec(17, 128, "q2", 64),
    PackedSpec(48, 128, "q4", 64, "u8"),
    PackedSpec(20, 96, "q3", 32, "u8"),
    PackedSpec(33, 320, "q2", 16, "u8"),  # two super-scales a row
    PackedSpec(33, 4096, "q4", 64),  # many steps of a program
    PackedSpec(33, 96, "fp4", 32, "e8m0"),
    PackedSpec(48, 128, "bf16"),
    PackedSpec(19, 37, "bf16"),  # an odd count of columns
    PackedSpec(48, 64, "f16"),
    PackedSpec(30, 50, "f32"),
]


def make_packed(spec: PackedSpec, seed: int = 0) -> Bytes:
    """Random weights of order 1."""
    random = np.random.default_rng(seed)
    if spec.is_quantized:
        codes = random.integers(0, 2**spec.bits, (spec.rows, spec.columns), dtype=np.uint8)
        grid = (spec.rows, spec.num_groups)
        if spec.encoding == "fp4":
            return pack_fp4(codes, random.integers(124, 130, grid, dtype=np.uint8), spec)
        if spec.meta == "u8":
            steps = random.integers(64, 256, (2, *grid), dtype=np.uint8)
            supers = random.uniform(200, 500, (spec.rows, second_level.num_supers(spec.num_groups))) / 2**spec.bits
            return pack_quantized(Quantized(codes, *second_level.decode(*steps, supers.astype("f2"), spec.bits)), spec)
        scales = (random.uniform(0.5, 2.0, grid) / 2**spec.bits).astype(np.float32)
        zeros = random.uniform(0, 2**spec.bits, grid).astype(np.float32)
        return pack_quantized(Quantized(codes, scales, zeros), spec)
    values = torch.from_numpy(random.standard_normal((spec.rows, spec.columns), dtype=np.float32))
    if spec.encoding == "bf16":
        return pack_plain(values.bfloat16().view(torch.uint16).numpy(), spec)
    return pack_plain(values.half().numpy() if spec.encoding == "f16" else values.numpy(), spec)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the whole tensor: norm of the difference over norm."""
    difference = found.detach().cpu().double() - expected.double()
    return float(difference.norm() / expected.double().norm())


# ------------------------------------------------------------------------------------- dequantize


@pytest.mark.parametrize("spec", _SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("by", [dequantize, kernels.dequantize], ids=["torch", "triton"])
def test_dequantize_equals_the_reference_bit_for_bit(spec: PackedSpec, dtype: torch.dtype, by: Any) -> None:
    packed = make_packed(spec)
    found = by(torch.from_numpy(packed).to(_DEVICE), spec, dtype)
    assert found.device.type == torch.device(_DEVICE).type
    assert torch.equal(found.cpu(), torch.from_numpy(reference.dequantize(packed, spec)).to(dtype))


@pytest.mark.parametrize("spec", _SPECS, ids=str)
def test_dequantize_rows_picks_rows(spec: PackedSpec) -> None:
    packed = torch.from_numpy(make_packed(spec)).to(_DEVICE)
    rows = torch.tensor([spec.rows - 1, 0, 5, 5, 16], device=_DEVICE)
    found = dequantize_rows(packed, spec, rows, torch.float32)
    assert torch.equal(found, dequantize(packed, spec, torch.float32)[rows])


# ---------------------------------------------------------------------------------------- kernels


def test_triton_kernels_run_here() -> None:
    """Else everything below is computed by torch: right, and slow."""
    assert kernels.why_not(torch.device(_DEVICE)) is None


@pytest.mark.parametrize("spec", [spec for spec in _SPECS if spec.is_quantized], ids=str)
@pytest.mark.parametrize("counts", [[1], [1, 1, 1], [2, 1, 8, 3], [16, 5]], ids=str)
def test_products_of_pairs_with_their_matrices(spec: PackedSpec, counts: list[int]) -> None:
    """Float32 sums of exact products: a pair's bits are the same alone."""
    triton = kernels.kernels_for(torch.device(_DEVICE))
    assert triton is not None
    matrices = [make_packed(spec, seed) for seed in range(len(counts))]
    memory = torch.from_numpy(np.concatenate(matrices)).to(_DEVICE)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((5, spec.columns), dtype=np.float32)).half()
    first = 0
    for matrix, count in zip(range(len(counts)), counts, strict=True):
        rows = [(first + i) % 5 for i in range(count)]
        weights = torch.from_numpy(reference.dequantize(matrices[matrix], spec))
        alone = product(triton, memory, spec, [matrix * spec.num_bytes], [count], rows, x)
        assert relative_error(alone, x[rows].float() @ weights.T) < 1e-5
        first += count
    offsets, all_rows = [m * spec.num_bytes for m in range(len(counts))], [i % 5 for i in range(first)]
    together = product(triton, memory, spec, offsets, counts, all_rows, x)
    assert torch.equal(together[first - counts[-1] :], alone)


def product(
    triton: kernels.TritonKernels,
    memory: torch.Tensor,
    spec: PackedSpec,
    offsets: list[int],
    counts: list[int],
    rows: list[int],
    x: torch.Tensor,
) -> torch.Tensor:
    pairs, (x_rows, y_rows) = kernels.Pairs.of(offsets, counts, torch.device(_DEVICE), rows, list(range(len(rows))))
    y = torch.full((len(rows), spec.rows), torch.nan, device=_DEVICE)
    triton.matmul(memory, spec, (0, None), pairs, x.to(_DEVICE), x_rows, y, y_rows)
    return y


# ---------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("spec", _SPECS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str
)
def test_packed_linear(spec: PackedSpec, dtype: torch.dtype, tolerance: float) -> None:
    packed = make_packed(spec)
    bias = torch.nn.Parameter(torch.linspace(-1, 1, spec.rows), requires_grad=False)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, spec.columns), dtype=np.float32))
    expected = x @ torch.from_numpy(reference.dequantize(packed, spec)).T + bias
    linear = PackedLinear(torch.from_numpy(packed), spec, bias, "float").to(_DEVICE)
    linear.bias = torch.nn.Parameter(bias.to(_DEVICE, dtype), requires_grad=False)
    found = linear(x.to(_DEVICE, dtype))
    assert found.dtype == dtype and found.shape == expected.shape
    assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize("spec", _SPECS, ids=str)
def test_packed_embedding(spec: PackedSpec) -> None:
    packed = make_packed(spec)
    embedding = PackedEmbedding(torch.from_numpy(packed), spec, None, torch.bfloat16).to(_DEVICE)
    ids = torch.tensor([[0, 3], [spec.rows - 1, 3]])
    expected = torch.from_numpy(reference.dequantize(packed, spec)).to(torch.bfloat16)[ids]
    assert torch.equal(embedding(ids.to(_DEVICE)).cpu(), expected)


# ------------------------------------------------------------------------------------- the demo model


@pytest.fixture(scope="module")
def runners() -> Iterator[tuple[Runner, Runner]]:
    """The demonstration store on the device, and on the CPU in class float."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(_ROOT / "benchmarks"))
        common = importlib.import_module("common")
    with common.in_process(_STORE, "float", _DEVICE) as device, common.in_process(_STORE, "float") as cpu:
        yield device, cpu


def greedy(runner: Runner, prompt: str, count: int) -> list[int]:
    request = GenerationRequest("greedy", runner.encode(prompt), count)
    return [token for event in runner.stream(request) for token in event.token_ids]


def test_logits_are_near_the_reference(runners: tuple[Runner, Runner]) -> None:
    for prompt in _PROMPTS:
        ids = list(runners[0].encode(prompt))
        found, expected = (runner.logits(ids) for runner in runners)
        assert found.shape == expected.shape and torch.isfinite(found).all()
        errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
        # A token whose second and third expert are almost equal may be routed otherwise: hence the median.
        assert errors.median() < 0.02
        divergence = torch.nn.functional.kl_div(
            found.log_softmax(-1), expected.log_softmax(-1), reduction="batchmean", log_target=True
        )
        assert divergence < 0.02


def test_greedy_text_is_mostly_the_same(runners: tuple[Runner, Runner]) -> None:
    same = 0
    for prompt in _PROMPTS:
        found, expected = (greedy(runner, prompt, 16) for runner in runners)
        same += next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), 16)
    assert same >= 0.7 * 16 * len(_PROMPTS)


def test_the_kv_cache_does_not_change_the_text(runners: tuple[Runner, Runner]) -> None:
    device, _ = runners
    ids = list(device.encode(_PROMPTS[0]))
    tokens = greedy(device, _PROMPTS[0], 8)
    logits = device.logits(ids + tokens[:-1])[len(ids) - 1 :]
    gaps = logits.max(dim=1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert gaps.max() < 0.25  # the chosen token is the best one, or as good as that in bfloat16


def test_experts_are_counted_and_narrow_matrices_stay_packed(runners: tuple[Runner, Runner]) -> None:
    device, _ = runners
    stats: ExpertsStats = device.stats()
    assert stats.num_experts == 48 and stats.num_used > 24
    packed = [module for module in device.model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]
    assert len(packed) == 24  # attention of 6 layers; the head is 16 bits wide
    assert all(module.packed.device.type == torch.device(_DEVICE).type for module in packed)
    head, embedding = device.model.get_output_embeddings(), device.model.get_input_embeddings()
    assert head.weight is embedding.weight and head.weight.device.type == torch.device(_DEVICE).type  # tied: one copy

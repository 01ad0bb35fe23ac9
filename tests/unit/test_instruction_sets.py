"""Instruction sets, threads and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from helpers.kernels import SPECS, name_of, normal
from helpers.matrices import assert_same_bits, random_matrix

from moray.runtime.kernels import ops, reference
from moray.runtime.kernels.block import Variant
from moray.runtime.kernels.isa import (
    INSTRUCTION_SET,
    INSTRUCTION_SETS,
    best_instruction_set,
    detect_instruction_set,
    prefetch_locality,
)
from moray.runtime.kernels.memory import all_equal
from moray.runtime.kernels.ops import MatrixKernel
from moray.runtime.kernels.pool import current_pool, set_num_threads
from moray.runtime.layout.packed import PackedSpec

pytestmark = pytest.mark.usefixtures("same_threads_after")


def supports(instruction_set: str) -> bool:
    features = llvm.get_host_cpu_features()
    needed = {"avx512vnni": "avx512vnni", "avx512": "avx512bw", "avxvnni": "avxvnni", "avx2": "avx2"}
    return instruction_set == "portable" or bool(features.get(needed[instruction_set]))


#: Every kind of code and both kinds of scales; the others are the same codes with the other scales.
OF_EVERY_SET = ("q8", "q4-u8", "q3", "q2", "fp4", "bf16", "f16")


def every_set() -> Iterator[Any]:
    """Every encoding with every set that this CPU has. Compiling takes a second each: some only in the long suite."""
    for name in filter(supports, INSTRUCTION_SETS):
        for spec in (spec for spec in SPECS if spec.encoding != "f32"):
            is_quick = name in ("portable", INSTRUCTION_SET) or name_of(spec) in OF_EVERY_SET
            marks = () if is_quick else (pytest.mark.long,)
            yield pytest.param(spec, name, id=f"{name_of(spec)}-{name}", marks=marks)


@pytest.mark.parametrize(("spec", "name"), list(every_set()))
def test_every_instruction_set_equals_the_reference(spec: PackedSpec, name: str) -> None:
    variant = Variant(spec.encoding, spec.group, spec.meta, spec.is_quantized, name)
    kernel = MatrixKernel.with_items(spec, variant.integer, ops.compile_items(variant).address)
    rng = np.random.default_rng(0)
    packed, x = random_matrix(spec, rng), normal(rng, 15, spec.columns)
    x[3] *= 1e30
    assert_same_bits(ops.linear(x, packed, kernel), reference.matmul(x, packed, spec))


def test_a_kernel_that_differs_from_its_definition_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checked: list[Variant] = []

    def only_portable_equals(variant: Variant, address: int) -> bool:
        checked.append(variant)
        return variant.instruction_set == "portable"

    variant = Variant("q4", 48, "f16", True, INSTRUCTION_SET)
    monkeypatch.setattr(ops, "_equals_reference", only_portable_equals)
    portable = replace(variant, instruction_set="portable")
    ops.checked_items.cache_clear()
    assert ops.checked_items(variant) == ops.checked_items(portable)
    if INSTRUCTION_SET != "portable":
        assert checked == [variant, portable]
        assert f"The {INSTRUCTION_SET} kernel for q4 differs from its definition" in caplog.text
    monkeypatch.setattr(ops, "_equals_reference", lambda variant, address: False)
    ops.checked_items.cache_clear()
    with pytest.raises(RuntimeError, match=r"the portable kernel for .* computes wrong results"):
        ops.checked_items(variant)
    ops.checked_items.cache_clear()


def test_the_self_check_notices_a_wrong_kernel() -> None:
    variant = Variant("q4", 64, "f16", True, INSTRUCTION_SET)
    right, wrong = (ops.compile_items(v).address for v in (variant, replace(variant, meta="u8")))
    assert ops._equals_reference(variant, right)
    assert not ops._equals_reference(variant, wrong)


def test_the_instruction_set_can_be_chosen_and_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORAY_KERNEL", "portable")
    assert detect_instruction_set() == "portable"
    monkeypatch.setenv("MORAY_KERNEL", "sse9")
    with pytest.raises(ValueError, match=r"MORAY_KERNEL=sse9 .* avx512vnni, avx512, avxvnni, avx2, portable"):
        detect_instruction_set()


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx512vnni": True, "avx512bw": True, "avx2": True, "f16c": True, "fma": True}, "avx512vnni"),
        ({"avx512vnni": False, "avx512bw": True, "avx2": True, "f16c": True, "fma": True}, "avx512"),
        ({"avxvnni": True, "avx2": True, "f16c": True, "fma": True}, "avxvnni"),
        ({"avx2": True, "f16c": True, "fma": True}, "avx2"),
        ({"avx2": True, "f16c": True}, "portable"),
        ({"avx2": True}, "portable"),
        ({}, "portable"),
    ],
)
def test_the_best_instruction_set_is_found(features: dict[str, bool], expected: str) -> None:
    assert best_instruction_set(features) == expected


@pytest.mark.parametrize(("cpu", "locality"), [("znver2", 2), ("znver4", 2), ("sapphirerapids", 3), ("generic", 3)])
def test_where_prefetches_go_depends_on_the_cpu(cpu: str, locality: int) -> None:
    assert prefetch_locality(cpu) == locality


def test_torch_and_the_kernels_get_the_same_threads() -> None:
    for count in (1, 2):
        set_num_threads(count)
        assert (torch.get_num_threads(), current_pool().num_threads) == (count, count)
    set_num_threads(10_000)  # more than there are cores
    assert current_pool().num_threads == torch.get_num_threads() == os.cpu_count()


def test_counters_are_compared_where_they_lie() -> None:
    counters = np.array([2, 4, 6], dtype=np.int64)
    at, expected = counters.ctypes.data + 8 * np.array([0, 2], dtype=np.int64), np.array([2, 6], dtype=np.int64)
    assert all_equal(at, expected)
    counters[1] = 5
    assert all_equal(at, expected)
    counters[2] = 8
    assert not all_equal(at, expected)

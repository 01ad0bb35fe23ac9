from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.matrices import random_matrix
from torch import nn

from moray.runtime.kernels.dequantize import dequantize
from moray.runtime.layout.packed import PackedSpec
from moray.runtime.model.packed_modules import PackedEmbedding, PackedLinear, unpack_plain


def packed(spec: PackedSpec) -> torch.Tensor:
    return torch.from_numpy(random_matrix(spec, np.random.default_rng(0)))


@pytest.mark.parametrize("encoding", ["bf16", "f16"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_unpacked_matrices_are_as_large_and_give_the_same(encoding: str, has_bias: bool) -> None:
    spec = PackedSpec(37, 64, encoding)  # type: ignore[arg-type]
    bias = nn.Parameter(torch.randn(37), requires_grad=False) if has_bias else None
    model = nn.ModuleDict({"head": PackedLinear(packed(spec), spec, bias, "int8")})
    weight = dequantize(model["head"].packed, spec, torch.float32)
    dtype = torch.bfloat16 if encoding == "bf16" else torch.float16
    unpack_plain(model, dtype)
    head = model["head"]
    assert type(head) is nn.Linear and head.weight.dtype is dtype and not head.weight.requires_grad
    assert torch.equal(head.weight.float(), weight) and head.weight.nbytes == 2 * 37 * 64
    assert head.bias is bias


def test_quantized_and_shared_matrices_stay_packed() -> None:
    quantized, plain = PackedSpec(48, 64, "q8", 64), PackedSpec(48, 64, "bf16")
    table = packed(plain)
    model = nn.ModuleDict(
        {
            "attention": PackedLinear(packed(quantized), quantized, None, "int8"),
            "embedding": PackedEmbedding(table, plain, None, torch.float32),
            "head": PackedLinear(table, plain, None, "int8"),
        }
    )
    before = dict(model.items())
    unpack_plain(model, torch.bfloat16)
    assert all(model[name] is module for name, module in before.items())

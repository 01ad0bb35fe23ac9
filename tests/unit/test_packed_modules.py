from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.matrices import random_matrix
from torch import nn

from moray.runtime.kernels.dequantize import dequantize
from moray.runtime.layout.packed import PackedSpec
from moray.runtime.model.families import build_model, load_config
from moray.runtime.model.loader import load_model
from moray.runtime.model.packed_modules import PackedEmbedding, PackedLinear, unpack_wide, warm_up
from moray.runtime.model.weights_read import dequantized_bytes, trunk_bytes, trunk_bytes_read
from moray.runtime.planning.measure import measure_profile
from moray.runtime.store.store import Store


def packed(spec: PackedSpec) -> torch.Tensor:
    return torch.from_numpy(random_matrix(spec, np.random.default_rng(0)))


CPU = torch.device("cpu")
WIDE = [PackedSpec(37, 64, "bf16"), PackedSpec(37, 64, "f16"), PackedSpec(4099, 64, "q8", 64)]  # of more than one part
NARROW = PackedSpec(48, 64, "q4", 64)


@pytest.mark.parametrize("spec", WIDE, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_wide_matrices_are_unpacked_to_what_they_stand_for(spec: PackedSpec, has_bias: bool) -> None:
    bias = nn.Parameter(torch.randn(spec.rows), requires_grad=False) if has_bias else None
    model = nn.ModuleDict({"head": PackedLinear(packed(spec), spec, bias, "int8")})
    dtype = torch.float16 if spec.encoding == "f16" else torch.bfloat16
    weight = dequantize(model["head"].packed, spec, dtype)
    unpack_wide(model, dtype, CPU)
    head = model["head"]
    assert type(head) is nn.Linear and not head.weight.requires_grad and head.bias is bias
    assert head.weight.dtype is dtype and torch.equal(head.weight, weight)


@pytest.mark.parametrize("spec", WIDE, ids=str)
def test_a_tied_embedding_is_unpacked_with_its_head(spec: PackedSpec) -> None:
    table, ids = packed(spec), torch.tensor([[3, 0], [spec.rows - 1, 3]])
    embedding = PackedEmbedding(table, spec, 2, torch.bfloat16)
    model = nn.ModuleDict({"embedding": embedding, "head": PackedLinear(table, spec, None, "int8")})
    unpack_wide(model, torch.bfloat16, CPU)
    assert type(model["embedding"]) is nn.Embedding and model["embedding"].padding_idx == 2
    assert model["embedding"].weight is model["head"].weight
    assert torch.equal(model["embedding"](ids), embedding(ids))


def test_narrow_matrices_and_embeddings_of_their_own_stay_packed() -> None:
    wide = WIDE[-1]
    model = nn.ModuleDict(
        {
            "attention": PackedLinear(packed(NARROW), NARROW, None, "int8"),
            "embedding": PackedEmbedding(packed(wide), wide, None, torch.float32),
        }
    )
    before = dict(model.items())
    unpack_wide(model, torch.bfloat16, CPU)
    assert all(model[name] is module for name, module in before.items())


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])  # granitemoe's embeddings are tied
def test_what_is_counted_for_a_device_is_what_lies_there(family: str, store: Callable[..., Path]) -> None:
    with Store.open(store(family, "hqq4")) as opened:
        manifest, model = opened.manifest, load_model(opened, "int8", CPU)
        counted = build_model(load_config(opened.path), torch.float32, "meta")
    unpack_wide(model, torch.float32, CPU)  # as on a device that computes in float32
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    assert trunk_bytes(counted, manifest, "cuda") == sum(sizes.values()) > trunk_bytes(counted, manifest, "cpu")
    embedding = manifest.packed_trunk["model.embed_tokens"]
    looked_up = 0 if family == "granitemoe" else embedding.num_bytes
    buffers = sum(buffer.nbytes for buffer in counted.buffers())
    assert trunk_bytes_read(counted, manifest, "cuda") == sum(sizes.values()) - looked_up - buffers


def test_plans_for_a_device_count_the_largest_matrix_that_is_dequantized_there(
    store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(store("mixtral", "hqq4")) as opened:
        layer = opened.manifest.layers[0].layout
        specs = [tensor.spec for tensor in layer.tensors if tensor.spec is not None]
        largest = max(spec.rows * spec.columns for spec in specs)
        assert dequantized_bytes(opened.manifest, torch.bfloat16) == 2 * largest
        monkeypatch.setattr("moray.runtime.planning.measure.compute_dtype", lambda device: torch.float32)
        on_cpu, on_device = (measure_profile(opened, torch.device(name)).workspace for name in ("cpu", "cuda"))
    assert on_device.constant == pytest.approx(on_cpu.constant + 4 * largest)


def test_warming_up_multiplies_by_one_matrix_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: seen.append((self.spec, len(x))))
    layers = [PackedLinear(packed(spec), spec, None, "int8") for spec in (NARROW, NARROW, WIDE[0])]
    warm_up(nn.ModuleList(layers), torch.float32)
    assert seen == [(spec, count) for spec in (NARROW, WIDE[0]) for count in (1, 2, 17)]

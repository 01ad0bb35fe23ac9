"""Reading stores back, for comparison with the checkpoints they were made from."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from moray.runtime.arrays import Bytes
from moray.runtime.convert.quantize import dequantize_rows
from moray.runtime.kernels import reference
from moray.runtime.layout.packed import PackedSpec, unpack_plain, unpack_quantized
from moray.runtime.layout.shard import ExpertKey, read_header
from moray.runtime.model.families import expert_modules
from moray.runtime.store.store import Store


def unpack(packed: Bytes, spec: PackedSpec) -> torch.Tensor:
    """[rows, columns] of a packed matrix: float32 if quantized, else in its own type."""
    if spec.encoding == "fp4":  # with the sign of zero
        return torch.from_numpy(reference.dequantize(packed, spec))
    if spec.is_quantized:
        return dequantize_rows(unpack_quantized(packed, spec))
    tensor = torch.from_numpy(unpack_plain(packed, spec).copy())
    return tensor.view(torch.bfloat16) if spec.encoding == "bf16" else tensor


def read_expert(store: Store, key: ExpertKey) -> dict[str, torch.Tensor]:
    """The tensors of one expert, matrices as [out, in]."""
    shard = store.read_shard(key)
    _, layout = read_header(shard)
    tensors = {}
    for tensor in layout.tensors:
        data = shard[tensor.offset : tensor.offset + tensor.num_bytes]
        tensors[tensor.name] = unpack(data, tensor.spec) if tensor.spec else torch.from_numpy(data.view(np.float32))
    return tensors


def read_trunk(store: Store) -> dict[str, torch.Tensor]:
    """The trunk under the names of the model's state dict, unpacked."""
    tensors = load_file(store.trunk_path)
    for path, spec in store.manifest.packed_trunk.items():
        tensors[f"{path}.weight"] = unpack(tensors.pop(f"{path}.packed").numpy(), spec)
    return tensors


@torch.no_grad()
def state_of_store(store: Store, model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict for a stock model (with experts), from nothing but the store."""
    state = read_trunk(store)
    for layer, (path, module) in enumerate(expert_modules(model)):
        experts = [read_expert(store, ExpertKey(layer, e)) for e in range(store.manifest.layers[layer].num_experts)]
        for name in experts[0]:
            values = [e[name].T if module.is_transposed and e[name].ndim == 2 else e[name] for e in experts]
            state[f"{path}.{name}"] = torch.stack(values)
    return state

"""Linear and embedding modules whose weights stay in the packed layout.

They use the same kernels as the experts: on the CPU in float32 activations, elsewhere those of runtime/device.
Unquantized weights are packed too (16 bits as published), so a float32 trunk needs no float32 copy of them.
"""

from __future__ import annotations

import torch
from torch import nn

from moray.runtime.device import kernels
from moray.runtime.kernels import ops
from moray.runtime.kernels.dequantize import dequantize_rows
from moray.runtime.kernels.lookup import lookup
from moray.runtime.kernels.ops import MatrixKernel
from moray.runtime.layout.packed import Numerics, PackedSpec


class PackedLinear(nn.Module):
    """y = x @ W^T + b for a packed W [out, in]."""

    packed: torch.Tensor

    def __init__(self, packed: torch.Tensor, spec: PackedSpec, bias: nn.Parameter | None, numerics: Numerics) -> None:
        super().__init__()
        self.register_buffer("packed", packed, persistent=False)
        self.spec = spec
        self.bias = bias
        self.in_features, self.out_features = spec.columns, spec.rows
        self._kernel = MatrixKernel.of(spec, numerics)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized matrix, made anew at each access: for model code that reads weights directly."""
        return kernels.dequantize(self.packed, self.spec, torch.get_default_dtype())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return kernels.linear(x, self.packed, self.spec, self.bias)
        rows = x.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features)
        num_rows = rows.numel() // self.in_features
        ops.linear_at(self._kernel, self.packed.data_ptr(), rows.data_ptr(), num_rows, y.data_ptr())
        return y if self.bias is None else y.add_(self.bias)


def is_unpacked(spec: PackedSpec) -> bool:
    """Whether a device multiplies by such a matrix in the type that it computes with, unpacked once at loading.

    Wide codes save a device little memory, and prompts would dequantize them in every chunk.
    """
    return spec.bits >= 8


def unpack_wide(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Turn packed matrices that ``is_unpacked`` names into usual ones there, and the embedding that is one of them too.

    Other embeddings stay packed: looking up rows dequantizes only those. To be called before the model is moved, which
    would make two of a tied weight.
    """
    weights: dict[int, nn.Parameter] = {}  # by the address of the packed bytes
    for path, module in list(model.named_modules()):
        if not isinstance(module, PackedLinear) or not is_unpacked(module.spec):
            continue
        weight = nn.Parameter(kernels.dequantize(module.packed.to(device), module.spec, dtype), requires_grad=False)
        usual = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        usual.weight, usual.bias = weight, module.bias  # type: ignore[assignment]
        model.set_submodule(path, usual)
        weights[module.packed.data_ptr()] = weight
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedEmbedding) and (tied := weights.get(module.packed.data_ptr())) is not None:
            table = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
            table.weight = tied
            model.set_submodule(path, table)


@torch.inference_mode()
def warm_up(model: nn.Module, dtype: torch.dtype) -> None:
    """Compile what the packed matrices of a model on a device need, for one token, a few, and a prompt."""
    matrices = {module.spec: module for module in model.modules() if isinstance(module, PackedLinear)}
    for matrix in matrices.values():
        for tokens in (1, 2, kernels.FEW + 1):
            matrix(torch.zeros(tokens, matrix.in_features, dtype=dtype, device=matrix.packed.device))


class PackedEmbedding(nn.Module):
    """Row lookup in a packed table [V, H]."""

    packed: torch.Tensor

    def __init__(self, packed: torch.Tensor, spec: PackedSpec, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("packed", packed, persistent=False)
        self.spec = spec
        self.num_embeddings, self.embedding_dim, self.padding_idx = spec.rows, spec.columns, padding_idx
        self._dtype = dtype

    @property
    def weight(self) -> torch.Tensor:
        return kernels.dequantize(self.packed, self.spec, self._dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.device.type == "cpu":
            rows = torch.from_numpy(lookup(self.packed.numpy(), self.spec, ids.reshape(-1).numpy())).to(self._dtype)
        else:
            rows = dequantize_rows(self.packed, self.spec, ids.reshape(-1), self._dtype)
        return rows.view(*ids.shape, self.embedding_dim)

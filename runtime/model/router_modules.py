"""Routers in one call, for the modules that compute what most families do; found by trying, as norms and gates are."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from moray.runtime.kernels import ops_fused, router
from moray.runtime.kernels.ops import MatrixKernel
from moray.runtime.layout.packed import PackedSpec, pack_plain

_USUAL = frozenset(
    (
        *("F", "bias", "dim", "dtype", "float", "functional", "hidden_dim", "linear", "nn", "norm_topk_prob"),
        *("num_experts", "reshape", "softmax", "sum", "to", "top_k", "topk", "torch", "view", "weight"),
    )
)
_TOLERANCE = 1e-5


class FusedRouter:
    """In place of a router's forward: x [T, C] -> logits [T, E], weights [T, K], ids int64 [T, K]."""

    def __init__(self, module: Any, kind: int) -> None:
        weight: torch.Tensor = module.weight.detach()
        self.num_experts, self.columns = weight.shape
        self.top_k, self.kind = int(module.top_k), kind
        self._bias = getattr(module, "bias", None)
        self._packed, spec = _pack(weight)
        self.kernel = MatrixKernel.of(spec, "float")

    @property
    def weight_at(self) -> int:
        return self._packed.data_ptr()

    @property
    def bias_at(self) -> int:
        return 0 if self._bias is None else int(self._bias.data_ptr())

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = hidden_states.reshape(-1, self.columns).contiguous()
        count = len(x)
        logits, weights = torch.empty(count, self.num_experts), torch.empty(count, self.top_k)
        ids = torch.empty(count, self.top_k, dtype=torch.int64)
        ops_fused.route_at(
            self.kernel,
            self.weight_at,
            self.bias_at,
            self.kind,
            x.data_ptr(),
            count,
            self.top_k,
            (logits.data_ptr(), ids.data_ptr(), weights.data_ptr()),
        )
        return logits, weights, ids


def fuse_routers(model: nn.Module) -> None:
    """Give the routers of a loaded float32 model on the CPU the fused forward where it fits."""
    for module in model.modules():
        if type(module).__name__.lower().endswith("topkrouter") and _looks_usual(module):
            fused = _fused(module)
            if fused is not None:
                module.forward = fused


def fused_router(module: Any) -> FusedRouter | None:
    """What ``fuse_routers`` gave a router, if it did."""
    forward = getattr(module, "forward", None)
    return forward if isinstance(forward, FusedRouter) else None


def uses_usual_names(router_class: type[nn.Module]) -> bool:
    """Whether a class's forward takes hidden states alone and uses no names but those of the usual routers."""
    forward = inspect.unwrap(router_class.forward)
    return len(inspect.signature(forward).parameters) == 2 and set(forward.__code__.co_names) <= _USUAL


def _looks_usual(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        uses_usual_names(type(module))
        and isinstance(weight, nn.Parameter)
        and weight.ndim == 2
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )


def _pack(weight: torch.Tensor) -> tuple[torch.Tensor, PackedSpec]:
    """In 16 bits if they hold it exactly: it is read at every token."""
    rows, columns = weight.shape
    if torch.equal(weight.bfloat16().float(), weight):
        spec = PackedSpec(rows, columns, "bf16")
        return torch.from_numpy(pack_plain(weight.bfloat16().view(torch.uint16).numpy(), spec)), spec
    spec = PackedSpec(rows, columns, "f32")
    return torch.from_numpy(pack_plain(weight.numpy(), spec)), spec


@torch.inference_mode()
def _fused(module: Any) -> FusedRouter | None:
    x = torch.randn(16, module.weight.shape[1], generator=torch.Generator().manual_seed(0))
    expected = module(x)
    if not isinstance(expected, tuple) or [part.shape[0] for part in expected] != [len(x)] * 3:
        return None
    for kind in (router.PROBABILITIES, router.NORMALIZED, router.OF_BEST):
        fused = FusedRouter(module, kind)
        logits, weights, ids = fused(x)
        if torch.equal(ids, expected[2]) and all(
            torch.allclose(mine, its.float(), rtol=_TOLERANCE, atol=_TOLERANCE)
            for mine, its in ((logits, expected[0]), (weights, expected[1]))
        ):
            return fused
    return None

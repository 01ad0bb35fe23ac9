"""Decoder layers and MoE blocks in one launch each, for the modules that compute what most families do.

Nothing here lists families: a module is taken if its forward uses no names but the usual ones, if its parts are fused
(attention, router, experts), and if a trial gives what the module itself gives.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from moray.runtime.arrays import Ints
from moray.runtime.experts.function import ExpertsBinding
from moray.runtime.kernels import attention as kernels
from moray.runtime.kernels.ops_fused import RoutedKernel
from moray.runtime.model.attention_modules import (
    FusedAttention,
    Rotation,
    fused_attention,
    replaced_forward,
    try_steps,
)
from moray.runtime.model.norm_modules import FusedRMSNorm
from moray.runtime.model.router_modules import FusedRouter, fused_router

_LAYER = frozenset(("input_layernorm", "mlp", "post_attention_layernorm", "self_attn"))
_BLOCK = frozenset(
    (
        *("empty_like", "experts", "gate", "input_jitter_noise", "jitter_noise", "reshape", "router", "shape"),
        *("torch", "training", "uniform_", "view"),
    )
)


class FusedBlock:
    """In place of a MoE block's forward: router and experts in one call, or in two if some must be fetched first."""

    def __init__(self, block: Any, kernel: RoutedKernel) -> None:
        self._plain, self.experts = _class_forward(block), block.experts
        self.binding: ExpertsBinding = block.experts.moray
        self.kernel = kernel

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        out_TH = self.binding.compute_routed(self.kernel, self.experts, x_TH)
        if out_TH is None:
            return self._plain(hidden_states)  # type: ignore[no-any-return]
        return out_TH.view(hidden_states.shape)


class FusedLayer:
    """In place of a decoder layer's forward: for one sequence, all but the MLP in one launch."""

    def __init__(self, layer: Any, attention: FusedAttention, norms: Ints) -> None:
        self._plain = _class_forward(layer)
        self.attention, self._mlp, self.norms = attention, layer.mlp, norms

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: Rotation | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        grows = self.attention.growing_layer(hidden_states, position_embeddings, attention_mask, past_key_values)
        if grows is not None and position_embeddings is not None:
            y, z, _ = self.attention.compute(hidden_states, position_embeddings, grows, self.norms)
            return y.add_(self._mlp(z))
        return self._plain(  # type: ignore[no-any-return]
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )


def fuse_layers(model: Any) -> None:
    """Give blocks and layers of a model on the CPU, its experts bound, the fused forward where it fits."""
    for module in list(model.modules()):
        router = _usual_router(module)
        if router is not None:
            kernel = module.experts.moray.routed_kernel(router)
            if kernel is not None and _block_agrees(module, router):
                module.forward = FusedBlock(module, kernel)
    for module in list(model.modules()):
        attention = fused_attention(getattr(module, "self_attn", None))
        if attention is not None and _names(module) == _LAYER and _has_usual_norms(module):
            fused = FusedLayer(module, attention, _norms_of(module))
            if _layer_agrees(fused, module, attention, model):
                module.forward = fused


def _class_forward(module: Any) -> Any:
    return type(module).forward.__get__(module)


def _names(module: Any) -> frozenset[str]:
    forward = inspect.unwrap(type(module).forward)
    return frozenset(getattr(forward, "__code__", fuse_layers.__code__).co_names)


def _usual_router(module: Any) -> FusedRouter | None:
    if not isinstance(getattr(getattr(module, "experts", None), "moray", None), ExpertsBinding):
        return None
    routers = [fused_router(getattr(module, name, None)) for name in ("gate", "router")]
    return next((r for r in routers if r is not None), None) if _names(module) <= _BLOCK else None


@torch.inference_mode()
def _block_agrees(block: Any, router: FusedRouter) -> bool:
    """Whether the block is ``experts(x, router(x))``, with something simple in place of the experts."""

    def stand_in(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return x * (weights * (ids + 1)).sum(dim=-1, keepdim=True)

    x = torch.randn(1, 3, router.columns, generator=torch.Generator().manual_seed(0))
    _, weights, ids = router(x)
    try:
        with replaced_forward(block.experts, stand_in):
            out = _class_forward(block)(x)
    except Exception:  # it calls its experts in another way
        return False
    return torch.is_tensor(out) and torch.equal(out, stand_in(x[0], ids, weights)[None])


def _has_usual_norms(layer: Any) -> bool:
    return all(isinstance(norm, FusedRMSNorm) for norm in (layer.input_layernorm, layer.post_attention_layernorm))


def _norms_of(layer: Any) -> Ints:
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    norms = np.zeros(kernels.NUM_NORMS, dtype=np.int64)
    norms[kernels.BEFORE], norms[kernels.AFTER] = before.weight.data_ptr(), after.weight.data_ptr()
    norms[kernels.BEFORE_EPSILON], norms[kernels.AFTER_EPSILON] = before.epsilon_bits, after.epsilon_bits
    return norms


@torch.inference_mode()
def _layer_agrees(fused: FusedLayer, layer: Any, attention: FusedAttention, model: Any) -> bool:
    """Whether the layer puts norms and sums where it is usual, with something simple in place of the MLP."""
    plain, columns = _class_forward(layer), layer.input_layernorm.weight.numel()
    try:
        with replaced_forward(layer.mlp, lambda x: 0.5 * x.flip(-1)):
            its, _ = try_steps(plain, attention.rotary, columns, model)
            mine, _ = try_steps(fused, attention.rotary, columns, model)
    except Exception:
        return False
    return all(torch.is_tensor(b) and torch.equal(a, b) for a, b in zip(mine, its, strict=True))

"""Attention in one launch, for the modules that compute what most families do.

Nothing here lists families. A module is taken if its forward uses no names but those of the usual attention (so that
nothing depends on, say, the position), and if a trial gives what the module itself gives.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from moray.runtime.arrays import Ints
from moray.runtime.kernels import attention as kernels
from moray.runtime.kernels.ops import MatrixKernel
from moray.runtime.kernels.ops_fused import (
    NO_NORMS,
    AttentionKernel,
    attention_at,
    batch_attention_at,
    prompt_attention_at,
)
from moray.runtime.layout.packed import Numerics, PackedSpec
from moray.runtime.model.batch_cache import RowsLayer
from moray.runtime.model.kv_layer import GrowingLayer, new_cache
from moray.runtime.model.norm_modules import FusedRMSNorm
from moray.runtime.model.packed_modules import PackedLinear

_USUAL = frozenset(
    (
        *("ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "apply_rotary_pos_emb", "attention_dropout", "config"),
        *("contiguous", "eager_attention_forward", "get_interface", "getattr", "head_dim", "k_norm", "k_proj"),
        *("layer_idx", "o_proj", "q_norm", "q_proj", "reshape", "scaling", "shape", "sliding_window", "training"),
        *("transpose", "update", "use_qk_norm", "v_proj", "view"),
    )
)
Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines, sines

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_TRIAL_TOKENS = 4
_TOLERANCE = 1e-5


class FusedAttention:
    """In place of a module's forward, for one sequence over a cache that grows in place. Else the module's own."""

    def __init__(self, module: Any, rotary: Any, numerics: Numerics) -> None:
        self._plain = type(module).forward.__get__(module)
        self.layer, self.rotary = int(module.layer_idx), rotary
        self._columns, self._width = module.q_proj.in_features, module.q_proj.out_features
        self.kernel = _kernel_of(module, numerics)
        self._module = module  # its weights' addresses are in the kernel, too

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Rotation | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = self.growing_layer(hidden_states, position_embeddings, attention_mask, past_key_values)
        if layer is not None and position_embeddings is not None:
            return self.compute(hidden_states, position_embeddings, layer)[0], None
        out: tuple[torch.Tensor, torch.Tensor | None] = self._plain(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        return out

    def growing_layer(
        self, x: torch.Tensor, rotation: Rotation | None, mask: torch.Tensor | None, cache: Any
    ) -> GrowingLayer | None:
        """The cache of this layer if ``compute`` can be used: each token sees itself and all before it."""
        layers = () if cache is None else cache.layers  # a family's own cache may add layers as they are needed
        layer = layers[self.layer] if self.layer < len(layers) else None
        if not isinstance(layer, GrowingLayer) or rotation is None:
            return None
        if isinstance(layer, RowsLayer):
            return layer  # whatever the mask: it was made for one sequence
        if x.numel() == self._columns:
            return layer if mask is None else None
        if x.shape[:-2].numel() != 1:
            return None
        tokens, before = x.shape[-2], layer.get_seq_length()
        causal = before == 0 if mask is None else _is_causal(mask, tokens, before + tokens)
        return layer if causal else None

    def compute(
        self, x: torch.Tensor, rotation: Rotation, layer: GrowingLayer, norms: Ints = NO_NORMS
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y, z and attended of ``attention_step`` or, for several tokens, of ``attention_prompt``, and so on."""
        cosines, sines, x = rotation[0].contiguous(), rotation[1].contiguous(), x.contiguous()
        tokens = x.numel() // self._columns
        attended, y, z = torch.empty(tokens * self._width), torch.empty_like(x), torch.empty_like(x)
        rotary = (cosines.data_ptr(), sines.data_ptr(), cosines.shape[-1])
        out = (attended.data_ptr(), y.data_ptr(), z.data_ptr())
        if isinstance(layer, RowsLayer):
            batch_attention_at(self.kernel, x.data_ptr(), rotary, layer.extend_rows(), out, norms)
            return y, z, attended
        if not layer.is_initialized:
            kv_heads, dim = (int(self.kernel.fields[field]) for field in (kernels.KV_HEADS, kernels.DIM))
            empty = x.new_empty(1, kv_heads, 0, dim)
            layer.lazy_initialization(empty, empty)
        keys, values = layer.extend(tokens)
        cache = (keys.data_ptr(), values.data_ptr(), 4 * keys.stride(1))
        at = (x.data_ptr(), rotary, cache, keys.shape[-2], out, norms)
        if tokens == 1:
            attention_at(self.kernel, *at)
        else:
            prompt_attention_at(self.kernel, *at, tokens)
        return y, z, attended


def fused_attention(module: Any) -> FusedAttention | None:
    """What ``fuse_attention`` gave an attention module, if it did."""
    forward = getattr(module, "forward", None)
    return forward if isinstance(forward, FusedAttention) else None


def is_all_fused(model: Any) -> bool:
    """Whether every layer's attention is, so that no large part of a prompt is left to torch."""
    num_fused = sum(fused_attention(module) is not None for module in model.modules())
    return num_fused == int(model.config.get_text_config().num_hidden_layers)


def fuse_attention(model: Any, numerics: Numerics) -> None:
    """Give the attention modules of a loaded float32 model on the CPU the fused forward where it fits."""
    rotary = next((m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    for module in list(model.modules()):
        if rotary is not None and _looks_usual(module):
            fused = FusedAttention(module, rotary, numerics)
            if _agrees(fused, module, model):
                module.forward = fused


def try_steps(step: Callable[..., Any], rotary: Any, columns: int, model: Any) -> tuple[list[Any], DynamicCache]:
    """What ``step`` gives for a few tokens and for one after them, in random values, and the cache it leaves."""
    hidden = torch.randn(1, _TRIAL_TOKENS, columns, generator=torch.Generator().manual_seed(0))
    cache, results = new_cache(model.config.get_text_config()), []
    for first, last in ((0, _TRIAL_TOKENS - 1), (_TRIAL_TOKENS - 1, _TRIAL_TOKENS)):
        x, positions = hidden[:, first:last], torch.arange(first, last)[None]
        how = {"position_embeddings": rotary(x, positions), "position_ids": positions}
        results.append(step(hidden_states=x, attention_mask=None, past_key_values=cache, **how))
    return results, cache


@contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a module, for a trial; then what it had, which may be a fused one."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def uses_usual_names(attention_class: type[nn.Module]) -> bool:
    """Whether a class's forward uses no names but those of the usual attention, projections included."""
    names = set(inspect.unwrap(attention_class.forward).__code__.co_names)
    return names <= _USUAL and set(_PROJECTIONS) <= names


def _looks_usual(module: Any) -> bool:
    projections = [getattr(module, name, None) for name in _PROJECTIONS]
    if not all(isinstance(projection, PackedLinear) for projection in projections):
        return False
    if not uses_usual_names(type(module)):
        return False
    q, k, v, _ = projections
    dim, parts = module.head_dim, q.out_features // k.out_features  # type: ignore[union-attr]
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    return (
        dim % 16 == 0
        and len({_variant(p.spec) for p in (q, k, v)}) == 1  # type: ignore[union-attr]
        and k.spec.rows == v.spec.rows == q.spec.rows // parts  # type: ignore[union-attr]
        and q.spec.rows % k.spec.rows == 0  # type: ignore[union-attr]
        and all(n is None or (isinstance(n, FusedRMSNorm) and n.weight.numel() == dim) for n in norms)
        and len({n.variance_epsilon for n in norms if n is not None}) <= 1
    )


def _variant(spec: PackedSpec) -> tuple[Any, ...]:
    return spec.encoding, spec.group, spec.meta, spec.columns


def _kernel_of(module: Any, numerics: Numerics) -> AttentionKernel:
    q, k, v, o = (getattr(module, name) for name in _PROJECTIONS)
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    epsilon = next((n.variance_epsilon for n in norms if n is not None), 0.0)
    fields = np.zeros(kernels.NUM_FIELDS, dtype=np.int64)
    fields[kernels.DIM] = dim = module.head_dim
    fields[kernels.HEADS], fields[kernels.KV_HEADS] = q.out_features // dim, k.out_features // dim
    fields[kernels.SCALE] = int(np.float32(module.scaling).view(np.int32))
    fields[kernels.EPSILON] = int(np.float32(epsilon).view(np.int32))
    fields[kernels.Q_NORM : kernels.K_NORM + 1] = [0 if n is None else n.weight.data_ptr() for n in norms]
    fields[kernels.Q_BIAS : kernels.V_BIAS + 1] = [0 if p.bias is None else p.bias.data_ptr() for p in (q, k, v)]
    fields[kernels.O_BIAS] = 0 if o.bias is None else o.bias.data_ptr()
    part_bytes = k.spec.num_bytes
    queries = q.packed.data_ptr() + part_bytes * np.arange(q.spec.rows // k.spec.rows)
    parts = np.array([*queries, k.packed.data_ptr(), v.packed.data_ptr()], dtype=np.int64)
    return AttentionKernel(
        fields,
        MatrixKernel.of(q.spec, numerics),
        MatrixKernel.of(k.spec, numerics),
        parts,
        MatrixKernel.of(o.spec, numerics),
        o.packed.data_ptr(),
    )


@torch.inference_mode()
def _agrees(fused: FusedAttention, module: Any, model: Any) -> bool:
    """Whether the heads' results and the cache are the module's own for a few tokens and one more."""
    columns, its, mine = module.q_proj.in_features, [], []
    hook = module.o_proj.register_forward_pre_hook(lambda _, inputs: its.append(inputs[0].reshape(-1)))

    def compute(
        hidden_states: Any, position_embeddings: Any, attention_mask: Any, past_key_values: Any, **_: Any
    ) -> None:
        layer = fused.growing_layer(hidden_states, position_embeddings, attention_mask, past_key_values)
        if layer is not None:
            mine.append(fused.compute(hidden_states, position_embeddings, layer)[2])

    try:
        _, its_cache = try_steps(type(module).forward.__get__(module), fused.rotary, columns, model)
        _, my_cache = try_steps(compute, fused.rotary, columns, model)
    except Exception:  # a rotary embedding that needs more, or a module that takes something else
        return False
    finally:
        hook.remove()
    if len(mine) != len(its):
        return False
    layers: Any = [cache.layers[fused.layer] for cache in (my_cache, its_cache)]
    pairs = [*zip(mine, its, strict=True), [layer.keys for layer in layers], [layer.values for layer in layers]]
    return all(torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in pairs)


_causal: weakref.ref[torch.Tensor] | None = None  # the last mask that was: all layers get the same one


def _is_causal(mask: torch.Tensor, tokens: int, length: int) -> bool:
    """Whether each of the last ``tokens`` of ``length`` sees all before it, and nothing else is asked for."""
    global _causal
    if mask.dtype != torch.bool or mask.shape != (1, 1, tokens, length):
        return False
    if _causal is None or _causal() is not mask:
        if not torch.equal(mask[0, 0], torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)):
            return False
        _causal = weakref.ref(mask)
    return True

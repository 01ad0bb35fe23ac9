"""Attention of one new token in one launch, for the modules that compute what most families do.

Nothing here lists families. A module is taken if its forward uses no names but those of the usual attention (so that
nothing depends on, say, the position), and if a trial gives what the module itself gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from moray.runtime.experts.source import Ints
from moray.runtime.kernels import attention as kernels
from moray.runtime.kernels.ops import MatrixKernel
from moray.runtime.kernels.ops_fused import NO_NORMS, AttentionKernel, attention_at, prepare_prompt_at
from moray.runtime.layout.packed import Numerics, PackedSpec
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
    """In place of a module's forward, over a cache that grows in place: one token in one launch, several with torch's
    softmax. Else the module's own.
    """

    def __init__(self, module: Any, rotary: Any, numerics: Numerics) -> None:
        self._plain = type(module).forward.__get__(module)
        self.layer, self.rotary = int(module.layer_idx), rotary
        self._columns, self._width = module.q_proj.in_features, module.q_proj.out_features
        self._kernel = _kernel_of(module, numerics)
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
            return self.step(hidden_states, position_embeddings, layer)[0], None
        layer = self._prompt_layer(hidden_states, attention_mask, past_key_values)
        if layer is not None and position_embeddings is not None:
            return self._prompt(hidden_states, position_embeddings, attention_mask, layer), None
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
        """The cache of this layer if ``step`` can be used: for one token that sees all tokens before it."""
        layer = self._layer_of(cache)
        if x.numel() != self._columns or mask is not None or rotation is None:
            return None
        return layer if isinstance(layer, GrowingLayer) and layer.is_initialized else None

    def _layer_of(self, cache: Any) -> Any:
        layers = () if cache is None else cache.layers  # a family's own cache may add layers as they are needed
        return layers[self.layer] if self.layer < len(layers) else None

    def _prompt_layer(self, x: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> GrowingLayer | None:
        """The cache of this layer if ``_prompt`` can be used: for one sequence, with a mask where it goes on."""
        layer = self._layer_of(cache)
        if not isinstance(layer, GrowingLayer) or x.shape[:-2].numel() != 1 or x.shape[-2] == 1:
            return None
        return layer if mask is not None or layer.get_seq_length() == 0 else None

    def _prompt(
        self, x: torch.Tensor, rotation: Rotation, mask: torch.Tensor | None, layer: GrowingLayer
    ) -> torch.Tensor:
        """Several tokens of one sequence: the softmax is torch's."""
        module, tokens = self._module, x.shape[-2]
        cosines, sines = rotation[0].contiguous(), rotation[1].contiguous()
        heads = [projection(x) for projection in (module.q_proj, module.k_proj, module.v_proj)]
        dim = module.head_dim
        if not layer.is_initialized:
            empty = x.new_empty(1, heads[1].shape[-1] // dim, 0, dim)
            layer.lazy_initialization(empty, empty)
        keys, values = layer.extend(tokens)
        turned = x.new_empty(1, tokens, heads[0].shape[-1] // dim, dim).transpose(1, 2)  # attention keeps the order
        prepare_prompt_at(
            self._kernel,
            (heads[0].data_ptr(), heads[1].data_ptr(), heads[2].data_ptr()),
            tokens,
            (cosines.data_ptr(), sines.data_ptr(), cosines.shape[-1]),
            (keys.data_ptr(), values.data_ptr(), 4 * keys.stride(1)),
            keys.shape[-2],
            turned.data_ptr(),
        )
        attended = nn.functional.scaled_dot_product_attention(
            turned, keys, values, attn_mask=mask, is_causal=mask is None, scale=module.scaling, enable_gqa=True
        )
        return module.o_proj(attended.transpose(1, 2).reshape(*x.shape[:-1], -1))  # type: ignore[no-any-return]

    def step(
        self, x: torch.Tensor, rotation: Rotation, layer: GrowingLayer, norms: Ints = NO_NORMS
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y, z and attended of ``kernels.attention_step``."""
        cosines, sines, x = rotation[0].contiguous(), rotation[1].contiguous(), x.contiguous()
        keys, values = layer.extend(1)
        attended, y, z = torch.empty(self._width), torch.empty_like(x), torch.empty_like(x)
        attention_at(
            self._kernel,
            x.data_ptr(),
            (cosines.data_ptr(), sines.data_ptr(), cosines.shape[-1]),
            (keys.data_ptr(), values.data_ptr(), 4 * keys.stride(1)),
            keys.shape[-2],
            (attended.data_ptr(), y.data_ptr(), z.data_ptr()),
            norms,
        )
        return y, z, attended


def fused_attention(module: Any) -> FusedAttention | None:
    """What ``fuse_attention`` gave an attention module, if it did."""
    forward = getattr(module, "forward", None)
    return forward if isinstance(forward, FusedAttention) else None


def fuse_attention(model: Any, numerics: Numerics) -> None:
    """Give the attention modules of a loaded float32 model on the CPU the fused forward where it fits."""
    rotary = next((m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    for module in list(model.modules()):
        if rotary is not None and _looks_usual(module):
            fused = FusedAttention(module, rotary, numerics)
            if _agrees(fused, module, model):
                module.forward = fused


def try_steps(
    step: Callable[..., Any], rotary: Any, columns: int, model: Any, last_step: Callable[..., Any] | None = None
) -> tuple[Any, DynamicCache]:
    """What ``step`` gives for one token after a few, in random values, and the cache it leaves.

    ``last_step``: another function for that one token.
    """
    hidden = torch.randn(1, _TRIAL_TOKENS, columns, generator=torch.Generator().manual_seed(0))
    cache, result = new_cache(model.config.get_text_config()), None
    for function, first, last in ((step, 0, _TRIAL_TOKENS - 1), (last_step or step, _TRIAL_TOKENS - 1, _TRIAL_TOKENS)):
        x, positions = hidden[:, first:last], torch.arange(first, last)[None]
        how = {"position_embeddings": rotary(x, positions), "position_ids": positions}
        result = function(hidden_states=x, attention_mask=None, past_key_values=cache, **how)
    return result, cache


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
        fields, MatrixKernel.of(k.spec, numerics), parts, MatrixKernel.of(o.spec, numerics), o.packed.data_ptr()
    )


@torch.inference_mode()
def _agrees(fused: FusedAttention, module: Any, model: Any) -> bool:
    """Whether the heads' results and the cache are the module's own after a few tokens and one more."""
    columns, seen = module.q_proj.in_features, []
    hook = module.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1)))
    plain = type(module).forward.__get__(module)
    try:
        _, its_cache = try_steps(plain, fused.rotary, columns, model)

        def last_step(hidden_states: Any, position_embeddings: Any, past_key_values: Any, **kwargs: Any) -> Any:
            layer = past_key_values.layers[fused.layer]
            return fused.step(hidden_states, position_embeddings, layer) if isinstance(layer, GrowingLayer) else None

        mine, my_cache = try_steps(fused, fused.rotary, columns, model, last_step)
    except Exception:  # a rotary embedding that needs more, or a module that takes something else
        return False
    finally:
        hook.remove()
    if mine is None:
        return False
    ours: Any = my_cache.layers[fused.layer]
    its: Any = its_cache.layers[fused.layer]
    # seen: its prompt, its last token, our prompt
    pairs = [(seen[2], seen[0]), (mine[2], seen[1]), (ours.keys, its.keys), (ours.values, its.values)]
    return all(torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in pairs)

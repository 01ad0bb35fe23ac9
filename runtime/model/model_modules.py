"""The step of one new token through a whole model, without what transformers prepares for batches and masks.

Nothing here lists families: a model is taken if its forward uses no names but the usual ones (so that nothing comes
between embedding, layers and norm), and if a trial over simple layers gives what its own forward gives.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from moray.runtime.model.attention_modules import Rotation, replaced_forward
from moray.runtime.model.batch_cache import RowsCache
from moray.runtime.model.kv_layer import GrowingLayer, new_cache
from moray.runtime.model.layer_run import join_layers
from moray.runtime.model.packed_modules import PackedLinear

_USUAL = frozenset(
    (
        *("DynamicCache", "MoeModelOutputWithPast", "ValueError", "arange", "config", "create_causal_mask"),
        *("create_sliding_window_causal_mask", "device", "dict", "embed_tokens", "enumerate", "get_seq_length"),
        *("isinstance", "layer_types", "layers", "norm", "num_hidden_layers", "rotary_emb", "set", "shape"),
        *("sliding_window", "torch", "unsqueeze"),
    )
)
_USUAL_HEAD = frozenset(
    (
        *("MoeCausalLMOutputWithPast", "attentions", "aux_loss", "config", "device", "hidden_states", "int"),
        *("isinstance", "last_hidden_state", "lm_head", "load_balancing_loss_func", "loss_function", "model"),
        *("num_experts", "num_experts_per_tok", "output_router_logits", "past_key_values", "router_aux_loss_coef"),
        *("router_logits", "slice", "slice_logits_to_keep", "to", "vocab_size"),
    )
)
_BLOCK = 256  # positions whose rotations are made at once
_KEPT_BLOCKS = 16
_TRIAL_TOKENS = 3


class FusedModel:
    """In place of a base model's forward: a token after others, of one sequence or of several, over caches that grow in
    place; else its own.
    """

    def __init__(self, model: Any, output: type[ModelOutput]) -> None:
        self._plain = type(model).forward.__get__(model)
        self._model, self._output = model, output
        self._rotations = _Rotations(model.rotary_emb)
        self._parts: list[Any] = list(model.layers)  # what is called in place of them

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if isinstance(past_key_values, RowsCache) and input_ids is not None:
            return self.wrap(self._compute(input_ids, past_key_values, past_key_values.positions), past_key_values)
        is_usual = (
            attention_mask is None and position_ids is None and inputs_embeds is None and not any(kwargs.values())
        )
        if is_usual and input_ids is not None and input_ids.shape == (1, 1) and _goes_on(past_key_values):
            return self.wrap(self.step(input_ids, past_key_values), past_key_values)
        return self._plain(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def wrap(self, x: torch.Tensor, cache: Any = None) -> ModelOutput:
        """What a model returns: the last hidden state, and the cache."""
        return self._output(last_hidden_state=x, past_key_values=cache)

    def step(self, input_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """The last hidden state [1, 1, H] of one token, [1, 1], after others in a cache that ``goes_on``."""
        return self._compute(input_ids, cache, [cache.layers[0].get_seq_length()])

    def _compute(self, input_ids: torch.Tensor, cache: Any, positions: list[int]) -> torch.Tensor:
        """``input_ids`` [1, B]: a new token of each of B sequences, at ``positions``."""
        model = self._model
        x, position_ids = model.embed_tokens(input_ids), torch.tensor([positions])
        how = {"attention_mask": None, "position_ids": position_ids, "past_key_values": cache, "use_cache": True}
        rotation = self._rotations.at(positions, x)
        for part in self._parts:
            x = part(x, position_embeddings=rotation, **how)
        last: torch.Tensor = model.norm(x)
        return last

    def join_layers(self) -> None:
        """To be called when layers were fused: consecutive ones are computed in one launch."""
        self._parts = join_layers(self._model.layers)


class FusedStep:
    """Logits of one new token, from the short step and the head, without what transformers puts around them."""

    def __init__(self, model: Any, base: FusedModel) -> None:
        self._model, self._base, self._head = model, base, model.get_output_embeddings()
        self._hooks = [h for m in (model, model.base_model) for h in (m._forward_hooks, m._forward_pre_hooks)]

    def __call__(self, token: int, cache: Any) -> torch.Tensor | None:
        """float32 [V] of a token that is appended to ``cache``; None if the model itself must be asked."""
        is_own = "forward" not in vars(self._model) and vars(self._model.base_model).get("forward") is self._base
        if not is_own or any(self._hooks) or not _goes_on(cache):
            return None
        logits: torch.Tensor = self._head(self._base.step(torch.tensor([[token]]), cache))[0, 0]
        return logits


class _Rotations:
    """Cosines and sines of positions, [1, B, D] each: rows of blocks of positions, of which the last used are kept."""

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        self._blocks: dict[int, Rotation] = {}

    def at(self, positions: list[int], x: torch.Tensor) -> Rotation:
        rows = [self._row(position, x) for position in positions]
        if len(rows) == 1:
            return rows[0]
        cosines, sines = (torch.cat(parts, dim=1) for parts in zip(*rows, strict=True))
        return cosines, sines

    def _row(self, position: int, x: torch.Tensor) -> Rotation:
        first, row = position // _BLOCK * _BLOCK, position % _BLOCK
        block = self._blocks.pop(first, None)
        if block is None:
            block = self._rotary(x, torch.arange(first, first + _BLOCK)[None])
        self._blocks[first] = block  # the last one used is the last
        if len(self._blocks) > _KEPT_BLOCKS:
            del self._blocks[next(iter(self._blocks))]
        cosines, sines = block
        return cosines[:, row : row + 1], sines[:, row : row + 1]


def fuse_model(model: Any) -> None:
    """Give the base model of a loaded causal language model on the CPU the short step where it fits."""
    base = model.base_model
    if base is model or not _looks_usual(base):
        return
    fused = _agreeing(base)
    if fused is not None:
        base.forward = fused


def fuse_steps(model: Any) -> None:
    """Join the layers of a model whose layers are fused, if it has the short step."""
    forward = model.base_model.forward
    if isinstance(forward, FusedModel):
        forward.join_layers()


def _goes_on(cache: Any) -> bool:
    return cache is not None and all(type(layer) is GrowingLayer and layer.is_initialized for layer in cache.layers)


def _looks_usual(base: Any) -> bool:
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    if any(not isinstance(getattr(base, name, None), torch.nn.Module) for name in parts):
        return False
    kind = getattr(base.rotary_emb, "rope_type", None)
    if not isinstance(kind, str) or "dynamic" in kind or kind == "longrope":
        return False  # its frequencies change with the length
    names = inspect.unwrap(type(base).forward).__code__.co_names
    return set(names) <= _USUAL and len(base.layers) == base.config.num_hidden_layers


@torch.inference_mode()
def fused_step(model: Any) -> FusedStep | None:
    """The step of a causal language model whose base has the short one, if it is that and the head, nothing else."""
    base, head = getattr(model.base_model, "forward", None), model.get_output_embeddings()
    names = set(inspect.unwrap(type(model).forward).__code__.co_names)
    if not isinstance(base, FusedModel) or not isinstance(head, PackedLinear) or not names <= _USUAL_HEAD:
        return None
    x = torch.randn(1, 1, head.in_features, generator=torch.Generator().manual_seed(0))
    try:
        with replaced_forward(model.base_model, lambda **_: base.wrap(x)):
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits
    except Exception:  # it needs more of its base than the last hidden state
        return None
    return FusedStep(model, base) if torch.equal(logits, head(x)) else None


@torch.inference_mode()
def _agreeing(base: Any) -> FusedModel | None:
    """The short step, if it gives what the model's own forward gives, over simple layers."""
    ids = torch.arange(1, _TRIAL_TOKENS + 2)[None]
    try:
        with ExitStack() as trial:
            # Layers that only sum what they are given: a trial costs nothing, and shows what reaches them.
            for index, layer in enumerate(base.layers):
                trial.enter_context(replaced_forward(layer, _simple_layer(index)))
            plain, its = type(base).forward.__get__(base), new_cache(base.config)
            plain(input_ids=ids[:, :-1], past_key_values=its, use_cache=True)
            wanted = plain(input_ids=ids[:, -1:], past_key_values=its, use_cache=True)
            fused, mine = FusedModel(base, type(wanted)), new_cache(base.config)
            fused(input_ids=ids[:, :-1], past_key_values=mine, use_cache=True)
            if not _goes_on(mine):
                return None
            got = fused(input_ids=ids[:, -1:], past_key_values=mine, use_cache=True)
    except Exception:  # layers that are called in another way
        return None
    same = got.keys() == wanted.keys() and torch.equal(got.last_hidden_state, wanted.last_hidden_state)
    return fused if same and mine.get_seq_length() == its.get_seq_length() else None


def _simple_layer(index: int) -> Any:
    def forward(x: torch.Tensor, *, position_embeddings: Rotation, past_key_values: Any, **given: Any) -> torch.Tensor:
        cache, tokens = past_key_values.layers[index], x.shape[1]
        keys = x.new_zeros(1, 1, tokens, 16)
        cache.update(keys, keys)
        cosines, sines = (rotation.mean(dim=-1, keepdim=True) for rotation in position_embeddings)
        mask = 0 if tokens > 1 or given["attention_mask"] is None else 1
        given_to_it = x * cosines + sines * (index + 1) + given["position_ids"][..., None] + mask
        # A little of it: of a hundred layers, too, the sum neither overflows nor forgets what the first one was given.
        out: torch.Tensor = x + given_to_it / 64
        return out

    return forward

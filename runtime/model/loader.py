"""A store's trunk as a transformers model whose experts come from an ``ExpertSource``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from moray.runtime.device.tier import DeviceTier
from moray.runtime.errors import StoreError
from moray.runtime.experts.function import IMPLEMENTATION, ExpertsBinding
from moray.runtime.experts.meter import ExpertsMeter
from moray.runtime.experts.source import BlankSource, ExpertSource
from moray.runtime.layout.packed import Numerics
from moray.runtime.layout.shard import ShardLayout
from moray.runtime.model.attention_modules import fuse_attention
from moray.runtime.model.families import build_model, expert_modules, load_config
from moray.runtime.model.layer_modules import fuse_layers
from moray.runtime.model.model_modules import fuse_model, fuse_steps
from moray.runtime.model.norm_modules import fuse_norms
from moray.runtime.model.packed_modules import PackedEmbedding, PackedLinear, unpack_wide, warm_up
from moray.runtime.model.router_modules import fuse_routers
from moray.runtime.store.manifest import Manifest
from moray.runtime.store.store import Store

PACKED_SUFFIX = ".packed"


def load_model(store: Store, numerics: Numerics, device: torch.device) -> PreTrainedModel:
    """Build the model of a store: trunk loaded, experts not yet bound, in evaluation mode.

    On the CPU activations are float32; on a GPU bfloat16 where it has it, else float16. Experts are never allocated.
    Raises StoreError if the trunk does not fit the model.
    """
    dtype = compute_dtype(device)
    store.verify_trunk()
    model = build_model(load_config(store.path), dtype)
    _load_trunk(model, store, numerics, dtype)
    if device.type != "cpu":
        unpack_wide(model, dtype, device)
        nn.Module.to(model, device)
        warm_up(model, dtype)
    else:
        fuse_norms(model)
        fuse_routers(model)
        fuse_attention(model, numerics)
        fuse_model(model)
    return model


def compute_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


@contextmanager
def blank_experts(model: PreTrainedModel, manifest: Manifest) -> Iterator[None]:
    """Let a model compute with zeros for experts for a while, so that none is read from anywhere."""
    blank = BlankSource(manifest)
    bindings: list[Any] = [module.moray for _, module in expert_modules(model)]
    sources = [binding.source for binding in bindings]
    for binding in bindings:
        binding.source = blank
    try:
        yield
    finally:
        for binding, source in zip(bindings, sources, strict=True):
            binding.source = source


def bind_experts(
    model: PreTrainedModel, store: Store, source: ExpertSource, numerics: Numerics, tier: DeviceTier | None = None
) -> ExpertsMeter:
    """Make every experts module use ``source``, and ``tier`` if there is one. Returns the meter that counts them."""
    meter = ExpertsMeter.of(store.manifest, source)
    modules = expert_modules(model)
    names = [name for name, _ in modules]
    expected = [layer.module for layer in store.manifest.layers]
    warm: set[ShardLayout] = set()
    if names != expected:
        raise StoreError(
            f"{store.path} holds experts for {', '.join(expected[:3])}..., the model built from its config.json has "
            f"{', '.join(names[:3])}...; convert the checkpoint again with this version of transformers"
        )
    for index, (_, module) in enumerate(modules):
        binding = ExpertsBinding(module, index, store.manifest.layers[index].layout, source, numerics)
        binding.meter = meter
        if tier is not None:
            experts, layout = binding.use_device(tier), store.manifest.layers[index].layout
            if layout not in warm:  # what is compiled for one layer serves all that are like it
                experts.warm_up(module, compute_dtype(tier.device))
                warm.add(layout)
        module.moray = binding  # type: ignore[assignment]
        module.config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]
    if model.device.type == "cpu":
        fuse_layers(model)
        fuse_steps(model)
        meter.reset()
    return meter


def _load_trunk(model: PreTrainedModel, store: Store, numerics: Numerics, dtype: torch.dtype) -> None:
    try:
        with safe_open(store.trunk_path, framework="pt") as file:
            names = set(file.keys())
            for path in store.manifest.packed_trunk:
                # A private copy: the trunk is read at every step and must not be paged out with the file.
                packed = file.get_tensor(path + PACKED_SUFFIX).clone()
                _install_packed(model, path, packed, store, numerics, dtype)
            _tie_head(model, numerics)
            packed_names = {path + PACKED_SUFFIX for path in store.manifest.packed_trunk}
            wanted = model.state_dict(keep_vars=True)
            state = {}
            for name in names - packed_names:
                tensor = file.get_tensor(name)
                like = wanted.get(name)
                target = like.dtype if like is not None and like.is_floating_point() else tensor.dtype
                state[name] = tensor.to(target, copy=True)
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{store.trunk_path} cannot be read ({error}); copy it again or convert again") from error
    result = model.load_state_dict(state, strict=False, assign=True)
    tied = set(model.all_tied_weights_keys)
    if tied & set(result.missing_keys):  # a head tied to an embedding that could not be packed
        model.tie_weights()
    missing = [name for name in result.missing_keys if name in wanted and name not in tied]
    if missing or result.unexpected_keys:
        raise StoreError(
            f"{store.trunk_path} does not fit the model: missing {missing[:3]}, unexpected "
            f"{result.unexpected_keys[:3]}; convert the checkpoint again with this version of transformers"
        )
    model.requires_grad_(False)


def _install_packed(
    model: PreTrainedModel,
    path: str,
    packed: torch.Tensor,
    store: Store,
    numerics: Numerics,
    dtype: torch.dtype,
) -> None:
    spec = store.manifest.packed_trunk[path]
    old = model.get_submodule(path)
    new: nn.Module
    if isinstance(old, nn.Embedding):
        new = PackedEmbedding(packed, spec, old.padding_idx, dtype)
        if type(old) is not nn.Embedding:
            raise StoreError(f"{path} is a {type(old).__name__}, which cannot be packed; convert again")
    else:
        assert isinstance(old, nn.Linear)
        new = PackedLinear(packed, spec, old.bias, numerics)
    model.set_submodule(path, new)


def _tie_head(model: PreTrainedModel, numerics: Numerics) -> None:
    """Let a tied output head read the packed embedding; both are the same bytes."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is nn.Linear and isinstance(embedding, PackedEmbedding) and _is_tied(model):
        for name, module in model.named_modules():
            if module is head:
                model.set_submodule(name, PackedLinear(embedding.packed, embedding.spec, head.bias, numerics))
                return


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    return any(f"{name}.weight" in model.all_tied_weights_keys for name in names)

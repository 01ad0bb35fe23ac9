"""Which part of a model each quantizable weight of its trunk belongs to."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from moray.runtime.model.families import is_experts

Component = Literal["experts", "attention", "shared", "dense", "embeddings"]
COMPONENTS: tuple[Component, ...] = get_args(Component)

_SHARED = {"shared_expert", "shared_experts", "shared_mlp"}


def classify(model: PreTrainedModel) -> dict[str, Component]:
    """Module path -> component, in model order, for the modules whose weight a recipe can quantize.

    Those are ``nn.Linear`` (exactly: subclasses may read their weight in their own way) and the input
    embedding. A tied output head is left out: its weight is the embedding's. Whatever is not listed
    (routers, norms, state-space mixers) stays as it is in the checkpoint.
    """
    found: dict[str, Component] = {}
    inputs = model.get_input_embeddings()
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if module is inputs and type(module) is nn.Embedding:
            found[path] = "embeddings"
        elif type(module) is not nn.Linear:
            continue
        elif module is head:
            if head.weight is not inputs.weight:
                found[path] = "embeddings"
        elif component := _component_of_linear(path, modules):
            found[path] = component
    return found


def _component_of_linear(path: str, modules: dict[str, nn.Module]) -> Component | None:
    parts = path.split(".")
    if _SHARED.intersection(parts[:-1]):
        return "shared"
    ancestors = [modules[".".join(parts[:depth])] for depth in range(1, len(parts))]
    names = [type(ancestor).__name__ for ancestor in ancestors]
    if any("Attention" in name for name in names):
        return "attention"
    if any(
        "mlp" in name.lower() and not _holds_experts(ancestor)  # an MoE block named MLP: this is its router
        for name, ancestor in zip(names, ancestors, strict=True)
    ):
        return "dense"
    return None


def _holds_experts(module: nn.Module) -> bool:
    return any(is_experts(child) for child in module.modules())

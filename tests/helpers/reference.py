"""Stock transformers as the reference, and moray in this process beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from helpers.checkpoints import stock_class
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from moray.runtime.device.tier import DeviceTier
from moray.runtime.experts.source import InProcessSource
from moray.runtime.generation.request import GenerationRequest
from moray.runtime.generation.runner import Runner
from moray.runtime.layout.packed import Numerics
from moray.runtime.model.architectures import find_architecture
from moray.runtime.model.loader import load_model
from moray.runtime.planning.profile import GenerationLimits
from moray.runtime.store.store import Store


def stock_model(checkpoint: Path) -> PreTrainedModel:
    """Transformers' own model: float32, eager experts. Of several models in one, the one that makes text."""
    config = AutoConfig.from_pretrained(checkpoint)
    model_class = stock_class(config)
    eager = {"experts_implementation": "eager"} if model_class._can_set_experts_implementation() else {}
    model = model_class.from_pretrained(checkpoint, dtype=torch.float32, **eager).eval()
    if model.can_generate() and model_class.forward is not nn.Module.forward:
        return model
    text_class = find_architecture(config)[0]
    return next(module for module in model.modules() if type(module) is text_class)


@torch.inference_mode()
def stock_generate(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """Greedy tokens of transformers' own loop, over the model's own cache."""
    prompt = torch.tensor([ids])
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
    return made[0, len(ids) :].tolist()


@torch.inference_mode()
def stock_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@torch.inference_mode()
def stock_greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """Greedy tokens by full forward passes: no cache and no generation loop of anybody's."""
    ids = list(ids)
    first = len(ids)
    while len(ids) < first + count:
        ids.append(int(stock_logits(model, ids)[-1].argmax()))
    return ids[first:]


@contextmanager
def runner(
    path: Path,
    numerics: Numerics,
    limits: GenerationLimits | None = None,
    *,
    device_slots: int | None = None,
    lanes: str = "auto",
) -> Iterator[Runner]:
    """A store generating in this process; with ``device_slots``, as if the CPU were also a device with so many."""
    with Store.open(path) as store:
        source, cpu, tier = InProcessSource(store), torch.device("cpu"), None
        if device_slots is not None:
            tier = DeviceTier.of(store.manifest, cpu, device_slots * store.manifest.slot_bytes, lanes)
        made = Runner(store, source, load_model(store, numerics, cpu), numerics, limits, tier=tier)
        try:
            yield made
        finally:
            made.close()
            source.close()


def greedy(made: Runner, ids: list[int], count: int) -> list[int]:
    events = list(made.stream(GenerationRequest("greedy", tuple(ids), count)))
    return [token for event in events for token in event.token_ids]

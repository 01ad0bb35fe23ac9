"""Stock transformers as the reference, and moray in this process beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moray.runtime.experts.source import InProcessSource
from moray.runtime.generation.request import GenerationRequest
from moray.runtime.generation.runner import Runner
from moray.runtime.layout.packed import Numerics
from moray.runtime.model.loader import load_model
from moray.runtime.store.store import Store


def stock_model(checkpoint: Path) -> PreTrainedModel:
    """Transformers' own model: float32, eager experts."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, experts_implementation="eager")
    return model.eval()


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
def runner(path: Path, numerics: Numerics) -> Iterator[Runner]:
    """A store generating in this process."""
    with Store.open(path) as store:
        source = InProcessSource(store)
        made = Runner(store, source, load_model(store, numerics, torch.device("cpu")), numerics)
        try:
            yield made
        finally:
            made.close()
            source.close()


def greedy(made: Runner, ids: list[int], count: int) -> list[int]:
    events = list(made.stream(GenerationRequest("greedy", tuple(ids), count)))
    return [token for event in events for token in event.token_ids]

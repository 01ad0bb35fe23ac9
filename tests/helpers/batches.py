"""Batched forward passes beside single steps, over sequences that join and leave."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch

from moray.runtime.model.batch import BatchForward
from moray.runtime.model.kv_layer import new_cache

Pair = tuple[torch.Tensor, torch.Tensor]


class Sequences:
    """Sequences of a model, each with two caches: one for batches, one for single steps."""

    def __init__(self, model: Any, batch: BatchForward, seed: int = 0) -> None:
        self._model, self._batch = model, batch
        self._vocab = model.config.get_text_config().vocab_size
        self._random = random.Random(seed)
        self.caches: list[tuple[Any, Any]] = []
        self.tokens: list[int] = []  # of the last step

    def join(self, length: int) -> None:
        """A new sequence with a prompt of random ids."""
        ids = torch.tensor([[self._token() for _ in range(length)]], device=self._model.device)
        cache = new_cache(self._model.config.get_text_config())
        self._model(input_ids=ids, past_key_values=cache, use_cache=True)
        self.caches.append((cache, copy.deepcopy(cache)))

    def leave(self, index: int) -> None:
        del self.caches[index]

    def step(self, rows: Sequence[int]) -> Pair:
        """Logits [B, V] of one batch of random tokens, and of single steps; ``rows``: the sequence of each."""
        self.tokens = tokens = [self._token() for _ in rows]
        got = self._batch(tokens, [self.caches[row][0] for row in rows])
        return got, torch.cat([self.alone(token, self.caches[row][1]) for token, row in zip(tokens, rows, strict=True)])

    def alone(self, token: int, cache: Any) -> torch.Tensor:
        ids = torch.tensor([[token]], device=self._model.device)
        logits: torch.Tensor = self._model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
        return logits

    def _token(self) -> int:
        return self._random.randrange(3, self._vocab - 5)


@torch.inference_mode()
def worst_difference(model: Any, batch: BatchForward) -> float:
    """Of batched logits from single ones, relative to the largest: prompts, windows and batches of several lengths."""
    sequences, worst = Sequences(model, batch), 0.0
    for lengths, rows in (((5, 23), (1, 0)), ((1, 12), (3, 0, 2, 1)), ((), (2,)), ((30,), (0, 1, 2, 3, 4))):
        for length in lengths:
            sequences.join(length)
        for _ in range(3):
            got, wanted = sequences.step(rows)
            worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
    return worst

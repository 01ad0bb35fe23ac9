"""A layer of a KV cache that grows in place: appending a token copies that token, not all before it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

_LEAST = 256  # tokens of room for the first ones


class GrowingLayer(DynamicLayer):
    """Keys and values [1, V, N, D] are views of buffers that have room for a quarter more, up to ``capacity`` tokens.

    ``capacity`` None: no limit. More tokens than that must not be appended.
    """

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = self._keys = key_states[..., :0, :]
        self.values = self._values = value_states[..., :0, :]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        keys, values = self.extend(key_states.shape[-2])
        keys[..., before:, :] = key_states
        values[..., before:, :] = value_states
        return keys, values

    def limit(self, capacity: int) -> None:
        """Change the capacity, to no less than the tokens that are there; room beyond it is given back."""
        self.capacity = capacity
        if self.is_initialized and self._keys.shape[-2] > capacity:
            length = self.get_seq_length()
            self._keys, self._values = (_grown(old, length, capacity) for old in (self._keys, self._values))
            self.keys, self.values = self._keys[..., :length, :], self._values[..., :length, :]

    def copy_prefix(self, other: GrowingLayer, length: int) -> None:
        """Take another layer's first ``length`` tokens into this one, which is empty. Nothing if it has none yet."""
        if other.is_initialized:
            assert other.keys is not None and other.values is not None
            self.update(other.keys[..., :length, :], other.values[..., :length, :])

    def extend(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for ``count`` tokens, whose keys and values the caller writes; returns all of them."""
        before = self.get_seq_length()
        length = before + count
        if length > self._keys.shape[-2]:
            room = max(_LEAST, length + length // 4)
            if self.capacity is not None:
                assert length <= self.capacity, f"{length} tokens in a cache of {self.capacity}"
                room = min(room, self.capacity)
            self._keys, self._values = (_grown(old, before, room) for old in (self._keys, self._values))
        self.keys, self.values = self._keys.narrow(-2, 0, length), self._values.narrow(-2, 0, length)
        return self.keys, self.values


def _grown(old: torch.Tensor, length: int, room: int) -> torch.Tensor:
    new = old.new_empty(*old.shape[:-2], room, old.shape[-1])
    new[..., :length, :] = old[..., :length, :]
    return new


def new_cache(
    config: PretrainedConfig, kind: type[DynamicCache] = DynamicCache, capacity: int | None = None
) -> DynamicCache:
    """An empty cache for a model; layers that keep everything grow in place, up to ``capacity`` tokens.

    ``kind``: what the model itself makes (``Runner`` finds it). A family's own kind is left as it is.
    """
    if kind is not DynamicCache:
        takes_config = "config" in inspect.signature(kind).parameters
        return kind(config=config) if takes_config else kind()
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache

"""Caches of several sequences seen as one, for a forward pass over a new token of each.

Shapes: B rows; V heads of keys, N tokens, D wide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from moray.runtime.arrays import Ints
from moray.runtime.model.kv_layer import GrowingLayer

#: What a layer of linear attention notes of each of its states.
_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")


class RowsLayer(GrowingLayer):
    """One layer of several sequences' caches, for kernels that read each row's keys where they are.

    A row is a new token of a sequence; rows of the same one follow each other in it.
    """

    def __init__(self, runs: Sequence[tuple[GrowingLayer, list[int]]], num_rows: int) -> None:
        super().__init__()
        self._runs, self._num_rows = runs, num_rows
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for layer, _ in self._runs)

    def extend_rows(self) -> Ints:
        """Make room for the new tokens: int64 [B, 4], for each row its cache as attention_batch.py wants it."""
        rows: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * self._num_rows
        for layer, places in self._runs:
            keys, values = layer.extend(len(places))
            at = (keys.data_ptr(), values.data_ptr(), 4 * keys.stride(1))
            for length, row in enumerate(places, keys.shape[2] - len(places) + 1):
                rows[row] = (*at, length)
        return np.array(rows, dtype=np.int64)


class RowsCache(Cache):
    """Caches of layers that grow in place, a row each; a cache that is named again gets another token.

    ``positions``: of each row in its sequence.
    """

    def __init__(self, caches: Sequence[DynamicCache]) -> None:
        places: dict[int, list[int]] = {}
        for row, cache in enumerate(caches):
            places.setdefault(id(cache), []).append(row)
        runs = [(caches[rows[0]], rows) for rows in places.values()]
        self.positions = [0] * len(caches)
        for cache, rows in runs:
            for position, row in enumerate(rows, cache.get_seq_length()):
                self.positions[row] = position
        layers: list[Any] = [
            RowsLayer([(cache.layers[index], rows) for cache, rows in runs], len(caches))  # type: ignore[misc]
            for index in range(len(caches[0].layers))
        ]
        super().__init__(layers=layers)


class PaddedLayer(DynamicLayer):
    """One layer of several sequences' caches, for modules that take keys [B, V, N, D], zeros before the shorter ones'.

    Layers with a window give what they hold of it.
    """

    def __init__(self, layers: Sequence[DynamicLayer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers = layers
        self.is_initialized = layers[0].is_initialized
        self.is_sliding = layers[0].is_sliding

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append row b to sequence b's layer; returns all rows' keys and values, padded on the left."""
        pairs = [
            layer.update(key_states[row : row + 1], value_states[row : row + 1], *args, **kwargs)
            for row, layer in enumerate(self._layers)
        ]
        keys, values = (_padded(rows) for rows in zip(*pairs, strict=True))
        return keys, values

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for layer in self._layers)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, and which the first one is, counted in the longest sequence."""
        sizes = [sum(layer.get_mask_sizes(query_length)) for layer in self._layers]
        length = max(layer.get_mask_sizes(query_length)[0] for layer in self._layers)
        return length, max(sizes) - length


class PaddedIndexedLayer(PaddedLayer):
    """``PaddedLayer`` of layers that also keep keys [B, N, D] to choose tokens by."""

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        layers: Sequence[Any] = self._layers
        return _padded([layer.update_indexer(indexer_key_states[b : b + 1]) for b, layer in enumerate(layers)])


class StackedStates(LinearAttentionLayer):
    """One layer of several sequences' states of linear attention: a copy, which ``put_back`` writes to them."""

    def __init__(self, layers: Sequence[LinearAttentionLayer]) -> None:
        first = layers[0]
        super().__init__(first.number_of_states)
        self._layers = layers
        self.device, self.dtype = first.device, first.dtype
        for name in _FLAGS:
            setattr(self, name, dict(getattr(first, name)))
        for name, index, parts in self._states():
            getattr(self, name)[index] = torch.cat(parts)

    def put_back(self) -> None:
        for name, index, parts in self._states():
            for part, row in zip(parts, getattr(self, name)[index].split(1), strict=True):
                part.copy_(row)

    def _states(self) -> Iterator[tuple[str, int, list[torch.Tensor]]]:
        for name in ("conv_states", "recurrent_states"):
            for index in range(self.number_of_states):
                parts = [getattr(layer, name)[index] for layer in self._layers]
                if parts[0] is not None:
                    yield name, index, parts


class StackedAndPaddedLayer(StackedStates, PaddedLayer):  # type: ignore[misc, override]
    """One layer of several sequences' caches that keep both, keys and states."""

    def __init__(self, layers: Sequence[Any]) -> None:
        PaddedLayer.__init__(self, layers)
        StackedStates.__init__(self, layers)


#: A layer of one sequence's cache -> the layer of several.
_PADDED: dict[type, Any] = {
    GrowingLayer: PaddedLayer,
    DynamicLayer: PaddedLayer,
    DynamicSlidingWindowLayer: PaddedLayer,
    DynamicIndexedLayer: PaddedIndexedLayer,
    LinearAttentionLayer: StackedStates,
    LinearAttentionAndFullAttentionLayer: StackedAndPaddedLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: StackedAndPaddedLayer,
    DummyLayer: lambda layers: layers[0],
}


def can_be_padded(cache: Cache) -> bool:
    """Whether all its layers are of kinds that are known here."""
    return all(type(layer) in _PADDED for layer in cache.layers)


class PaddedCache(Cache):
    """Caches of distinct sequences, a row each, padded to the longest. ``mask``: bool [B, N], true where a token is."""

    def __init__(self, caches: Sequence[DynamicCache]) -> None:
        columns = zip(*(cache.layers for cache in caches), strict=True)
        super().__init__(layers=[_PADDED[type(layers[0])](layers) for layers in columns])
        self.positions = [cache.get_seq_length() for cache in caches]
        lengths = torch.tensor(self.positions)[:, None] + 1
        total = int(lengths.max())
        self.mask = torch.arange(total)[None] >= total - lengths

    def put_back(self) -> None:
        """After the forward pass: give the sequences what is theirs of what was copied."""
        for layer in self.layers:
            if isinstance(layer, StackedStates):
                layer.put_back()


def _padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    longest = max(row.shape[-2] for row in rows)
    return torch.cat([F.pad(row, (0, 0, longest - row.shape[-2], 0)) for row in rows])

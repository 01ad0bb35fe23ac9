"""One sequence's KV cache and the tokens it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from moray.runtime.model.kv_layer import GrowingLayer, new_cache

#: How a token was computed: with others of its prompt, or by itself. The last bits of its keys and values may differ.
AS_PROMPT, AS_STEP = 1, 0

_STRIDE = 256  # tokens compared at once


@dataclass(slots=True, eq=False)
class KVCache:
    """A transformers cache and the tokens it holds: at most ``reserved_tokens`` of them in ``reserved_bytes``."""

    cache: DynamicCache = field(default_factory=DynamicCache)
    ids: list[int] = field(default_factory=list)
    kinds: bytearray = field(default_factory=bytearray)  # of each: AS_PROMPT or AS_STEP
    reserved_tokens: int = 0
    reserved_bytes: int = 0

    @classmethod
    def empty(cls, config: PretrainedConfig, kind: type[DynamicCache] = DynamicCache) -> KVCache:
        return cls(new_cache(config, kind))

    def reserve(self, tokens: int, num_bytes: int) -> None:
        """Let the cache grow to so many tokens, which take so many bytes. Room beyond them is given back."""
        self.reserved_tokens, self.reserved_bytes = tokens, num_bytes
        for layer in self.cache.layers:
            if isinstance(layer, GrowingLayer):
                layer.limit(tokens)

    @property
    def can_chunk(self) -> bool:
        """Whether a prompt may be fed in pieces. Linear-attention states take whole prompts only.

        So do layers that treat a prompt's tokens unlike generated ones, and a family's own kind of cache, of which
        nothing is known.
        """
        return type(self.cache) is DynamicCache and all(_can_go_on(layer) for layer in self.cache.layers)

    @property
    def can_crop(self) -> bool:
        """Whether tokens may be taken off the end: not from states or windows that forgot what was before."""
        layers = self.cache.layers
        return self.can_chunk and all(
            layer.is_croppable and not getattr(layer, "is_sliding", False) for layer in layers
        )

    @property
    def can_copy(self) -> bool:
        """Whether its first tokens' keys and values are those of any other sequence that begins with them."""
        return self.can_crop and all(isinstance(layer, GrowingLayer) for layer in self.cache.layers)

    def reusable_prefix(self, ids: Sequence[int], kinds: bytearray) -> int:
        """How many first tokens of a sequence are here as they would be computed; at least one is left to compute.

        None if prompts must be fed whole: to go on from such a state with several tokens is not exact.
        """
        limit = common_prefix(self.kinds, kinds, len(ids) - 1) if self.can_chunk else 0
        length = common_prefix(self.ids, ids, limit)
        if length == len(self.ids):
            return length
        if list(kinds[length - 1 : length + 2]) in ([AS_PROMPT] * 2, [AS_PROMPT, AS_PROMPT, AS_STEP]):
            length -= 1  # one token that is left of a prompt would be computed as a step
        return max(length, 0) if self.can_crop else 0

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens, also if a pass failed before all layers had the tokens after ``ids``."""
        for layer in self.cache.layers:
            assert isinstance(layer, DynamicLayer)
            surplus = layer.get_seq_length() - length
            if surplus > 0:
                layer.crop(-surplus)
        del self.ids[length:], self.kinds[length:]

    def note(self, tokens: Sequence[int], kind: int) -> None:
        """These tokens were computed, their keys and values appended."""
        self.ids += tokens
        self.kinds += bytes([kind]) * len(tokens)

    def copy_prefix(self, other: KVCache, length: int) -> None:
        """Take the first ``length`` tokens of another cache of the same model into this one, which is empty."""
        assert other.can_copy and not self.ids and length <= len(other.ids)
        for mine, its in zip(self.cache.layers, other.cache.layers, strict=True):
            assert isinstance(mine, GrowingLayer) and isinstance(its, GrowingLayer)
            mine.copy_prefix(its, length)
        self.ids, self.kinds = other.ids[:length], other.kinds[:length]


def common_prefix(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    """How many first tokens, at most ``limit``, are the same."""
    limit, at = min(limit, len(one), len(other)), 0
    while at < limit and list(one[at : at + _STRIDE]) == list(other[at : at + _STRIDE]):
        at += _STRIDE
    while at < limit and one[at] == other[at]:
        at += 1
    return min(at, limit)


def _can_go_on(layer: object) -> bool:
    is_linear = isinstance(layer, LinearAttentionCacheLayerMixin)
    return isinstance(layer, DynamicLayer) and not is_linear and not hasattr(layer, "set_prefill_length")

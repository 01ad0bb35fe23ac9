"""KV caches that outlive their request, so that the next turn of a chat prefills only what is new."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from moray.runtime.model.kv_layer import GrowingLayer, new_cache


@dataclass(slots=True)
class KVCache:
    """A transformers cache and the tokens it holds."""

    cache: DynamicCache
    ids: list[int]
    reserved_bytes: int = 0  # what the cache may grow to

    @classmethod
    def empty(cls, config: PretrainedConfig, kind: type[DynamicCache] = DynamicCache) -> KVCache:
        return cls(new_cache(config, kind), [])

    def reserve(self, tokens: int, num_bytes: int) -> None:
        """Let the cache grow to so many tokens, which take so many bytes."""
        self.reserved_bytes = num_bytes
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

    def reusable_prefix(self, prompt: tuple[int, ...]) -> int:
        """How many first tokens of the prompt this cache can serve; at least one is always left to compute.

        None if prompts must be fed whole: to go on from such a state with several tokens is not exact.
        """
        if not self.can_chunk:
            return 0
        common = 0
        for mine, wanted in zip(self.ids, prompt[:-1], strict=False):
            if mine != wanted:
                break
            common += 1
        return common if common == len(self.ids) or self.can_crop else 0

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        surplus = len(self.ids) - length
        if surplus:
            self.cache.crop(-surplus)
            del self.ids[length:]


class KeptCaches:
    """The caches of the last finished requests, newest last. One request uses a cache at a time."""

    def __init__(self, capacity: int, kind: type[DynamicCache] = DynamicCache) -> None:
        self._capacity = capacity
        self._kind = kind
        self._kept: list[KVCache] = []

    def take(self, prompt: tuple[int, ...], config: PretrainedConfig) -> KVCache:
        """The cache that serves most of the prompt, cropped to it; an empty one if none does."""
        best = max(self._kept, key=lambda kv: kv.reusable_prefix(prompt), default=None)
        if best is None or best.reusable_prefix(prompt) == 0:
            return KVCache.empty(config, self._kind)
        self._kept.remove(best)
        best.crop(best.reusable_prefix(prompt))
        return best

    @property
    def reserved_bytes(self) -> int:
        return sum(kv.reserved_bytes for kv in self._kept)

    def keep(self, kv: KVCache) -> None:
        self._kept.append(kv)
        del self._kept[: -self._capacity]

    def shrink(self, num_bytes: int) -> None:
        """Drop the oldest until all together have at most so many bytes reserved."""
        while self.reserved_bytes > num_bytes:
            del self._kept[0]


def _can_go_on(layer: object) -> bool:
    is_linear = isinstance(layer, LinearAttentionCacheLayerMixin)
    return isinstance(layer, DynamicLayer) and not is_linear and not hasattr(layer, "set_prefill_length")

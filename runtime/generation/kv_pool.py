"""All KV caches of an engine, those that run and those that are kept for later, within one budget of blocks.

A block is ``BLOCK_TOKENS`` tokens of one sequence: what is reserved grows by whole blocks, while a cache's own buffers
stay contiguous (vLLM's pages, Kwon et al. 2023, section 4, are there to share prefixes without copying; here a copy
takes far less time than computing them). What a running cache needs comes before what is kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import inf

from transformers import DynamicCache, PretrainedConfig

from moray.runtime.generation.kv import KVCache, common_prefix
from moray.runtime.planning.profile import GenerationLimits

BLOCK_TOKENS = 64
KEPT_CACHES = 16
_GENEROUS = 16  # a cache that grows gets a sixteenth more if nobody waits: it is copied less often


class KVPool:
    """Owns every cache from ``open`` to ``close``. Not thread-safe; called between forward passes."""

    def __init__(
        self, config: PretrainedConfig, limits: GenerationLimits, kind: type[DynamicCache] = DynamicCache
    ) -> None:
        self._config, self._limits, self._kind = config, limits, kind
        self._open: list[KVCache] = []
        self._kept: list[KVCache] = []  # newest last
        self.limit_bytes = limits.kv_bytes
        self.context_length = limits.context_length
        if limits.kv_bytes is not None:  # the longest sequence that fits alone
            lengths = range(1, limits.context_length + 1)
            self.context_length = bisect_right(lengths, limits.kv_bytes, key=limits.sequence_bytes)

    @property
    def reserved_bytes(self) -> int:
        """What all caches may take: never more than the limit."""
        return sum(kv.reserved_bytes for kv in self.caches)

    @property
    def open_caches(self) -> list[KVCache]:
        return list(self._open)

    @property
    def caches(self) -> list[KVCache]:
        return [*self._open, *self._kept]

    def open(self, ids: Sequence[int], kinds: bytearray, is_new: bool) -> KVCache | None:
        """A cache with room for these tokens that holds the longest first part of them that is in any other.

        Parts are equal if their tokens were computed in the same way, too, so that no bit depends on what was kept. A
        new request may also go on where a kept cache ends, as a chat does. The last of ``ids`` is never in the cache:
        it is to be computed. None if there is no room, now, for all and one more block of each cache that is open.
        """
        tokens = self._rounded(len(ids))
        needed, spare = self._bytes(tokens), self._spare()
        if self._free(spare) + sum(kv.reserved_bytes for kv in self._kept) < needed:
            return None
        source, length = self._best_source(ids, kinds, is_new)
        if source in self._kept and (length == len(source.ids) or not source.can_copy or self._free(spare) < needed):
            self._kept.remove(source)  # moved: all of it is used, it cannot be copied, or there is no room for both
            self._make_room(needed, spare)
            source.crop(length)
            kv = source
            kv.reserve(tokens, needed)
        else:
            self._make_room(needed, spare)
            kv = KVCache.empty(self._config, self._kind)
            kv.reserve(tokens, needed)
            if source is not None:
                kv.copy_prefix(source, length)
                self._touch(source)
        self._open.append(kv)
        return kv

    def grow(self, kv: KVCache, tokens: int, most: int, is_generous: bool) -> bool:
        """Make room for ``tokens`` tokens of an open cache, which will have ``most`` at most. False: there is none."""
        if tokens <= kv.reserved_tokens:
            return True
        if is_generous:
            roomy = self._rounded(min(most, max(tokens, kv.reserved_tokens + kv.reserved_tokens // _GENEROUS)))
            if self._bytes(roomy) - kv.reserved_bytes <= self._free():
                kv.reserve(roomy, self._bytes(roomy))
                return True
        tokens = self._rounded(tokens)
        needed = self._bytes(tokens) - kv.reserved_bytes
        self._make_room(needed)
        if self._free() < needed:
            return False
        kv.reserve(tokens, self._bytes(tokens))
        return True

    def close(self, kv: KVCache, keep: bool) -> None:
        """End the use of an open cache: kept, in as many blocks as its tokens need, or dropped."""
        self._open.remove(kv)
        if not keep or not kv.ids:
            return
        tokens = self._rounded(len(kv.ids))
        kv.reserve(tokens, self._bytes(tokens))
        if kv.can_crop:  # it serves whatever those did that it continues
            self._kept = [
                old for old in self._kept if not (_is_part(old.ids, kv.ids) and _is_part(old.kinds, kv.kinds))
            ]
        self._kept.append(kv)
        del self._kept[:-KEPT_CACHES]

    def validate(self) -> None:
        """No byte is reserved twice or beyond the limit, and every cache holds what its account says."""
        assert self.limit_bytes is None or self.reserved_bytes <= self.limit_bytes
        assert len({id(kv) for kv in self.caches}) == len(self.caches)
        assert len(self._kept) <= KEPT_CACHES
        for kv in self.caches:
            assert len(kv.kinds) == len(kv.ids) <= kv.reserved_tokens <= self.context_length
            assert kv.reserved_bytes == self._bytes(kv.reserved_tokens)
            assert not kv.ids or kv.cache.get_seq_length() == len(kv.ids)

    def _rounded(self, tokens: int) -> int:
        return min(-(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS, self.context_length)

    def _bytes(self, tokens: int) -> int:
        return self._limits.sequence_bytes(tokens)

    def _free(self, spare: int = 0) -> float:
        return inf if self.limit_bytes is None else self.limit_bytes - spare - self.reserved_bytes

    def _spare(self) -> int:
        """Bytes of a block for each open cache: who comes must not be sent away again at once."""
        return sum(self._bytes(self._rounded(kv.reserved_tokens + 1)) - kv.reserved_bytes for kv in self._open)

    def _make_room(self, num_bytes: int, spare: int = 0) -> None:
        """Drop kept caches, the oldest first, until so much is free."""
        while self._kept and self._free(spare) < num_bytes:
            del self._kept[0]

    def _best_source(self, ids: Sequence[int], kinds: bytearray, is_new: bool) -> tuple[KVCache | None, int]:
        """Which cache serves most first tokens, and how many. One that can only be moved must be kept."""
        best: tuple[KVCache | None, int] = (None, 0)
        for kv in reversed(self.caches):
            length = 0
            if kv in self._kept or kv.can_copy:
                length = kv.reusable_prefix(ids, kinds)
                if not kv.can_copy and 2 * length < len(kv.ids):
                    length = 0  # moved, it would lose more than it saves
            if is_new and kv in self._kept and kv.can_chunk and _is_part(kv.ids, ids[:-1]):
                length = len(kv.ids)
            if length > best[1]:
                best = kv, length
        return best

    def _touch(self, kv: KVCache) -> None:
        """What was of use goes last."""
        if kv in self._kept:
            self._kept.remove(kv)
            self._kept.append(kv)


def _is_part(part: Sequence[int], whole: Sequence[int]) -> bool:
    return common_prefix(part, whole, len(part)) == len(part)

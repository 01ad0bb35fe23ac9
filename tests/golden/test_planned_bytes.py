"""What is planned for a model is what it takes: its trunk, and its KV caches, family by family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.reference import runner

from moray.runtime.generation.kv import KVCache
from moray.runtime.generation.request import GenerationRequest
from moray.runtime.generation.runner import Runner
from moray.runtime.model.catalog import SAMPLE
from moray.runtime.planning.measure import _storage_bytes, measure_profile
from moray.runtime.planning.profile import GenerationLimits, ModelProfile
from moray.runtime.store.store import Store

#: Families that compress blocks of tokens: a cache in the middle of a block may be smaller than planned.
_COMPRESSING = {"deepseek_v4"}
_CHUNK = 16


@torch.inference_mode()
def _fed(made: Runner, kind: type, capacity: int, *steps: int) -> int:
    """Bytes of a real cache with room for ``capacity`` tokens, after passes of so many tokens."""
    kv = KVCache.empty(made.model.config.get_text_config(), kind)
    kv.reserve(capacity, 0)
    for tokens in steps:
        made.model(input_ids=torch.arange(tokens)[None] % 190, past_key_values=kv.cache, use_cache=True)
    return _storage_bytes(kv.cache, set())


@pytest.mark.parametrize("family", SAMPLE)
def test_planned_bytes_are_those_of_the_loaded_model(family: str, store: Callable[..., Path]) -> None:
    path = store(family, "none")
    with Store.open(path) as opened:
        profile = measure_profile(opened)
    with runner(path, "float") as made:
        tensors = [*made.model.parameters(), *made.model.buffers()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        assert sum(storages.values()) == profile.trunk_bytes
        kind = type(made.model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values)
        kv = profile.sequence
        for tokens in (70, 300):
            real, planned = _fed(made, kind, tokens, tokens), kv.kv_bytes(tokens, tokens)
            assert real == planned or (family in _COMPRESSING and 0.8 * planned < real < planned)
        if kv.can_chunk:  # after the last piece of a prompt, and while decoding
            assert _fed(made, kind, 304, *[_CHUNK] * 19) <= kv.kv_bytes(304, _CHUNK)
        assert _fed(made, kind, 80, 70, *[1] * 10) <= kv.kv_bytes(80, 70)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jamba", "deepseek_v4"])
def test_a_generation_stays_below_its_reservation(family: str, store: Callable[..., Path]) -> None:
    """Through the step loop: prompts in chunks, kept caches that are cut and grow again, at every step."""
    path = store(family, "none")
    with Store.open(path) as opened:
        profile = measure_profile(opened)
    limits = GenerationLimits(512, _CHUNK, _budget(profile), profile.sequence)
    with runner(path, "float", limits) as made:
        loop, used = made._loop, []
        for index, count in enumerate((150, 40, 90)):
            prompt = tuple(3 + (7 * i * i) % 180 for i in range(count))
            loop.add(GenerationRequest(str(index), prompt, 20))
        while not loop.is_idle:
            loop.step()
            caches = loop.caches
            for kv in caches:
                assert _storage_bytes(kv.cache, set()) <= kv.reserved_bytes
            used.append(sum(_storage_bytes(kv.cache, set()) for kv in caches))
            assert sum(kv.reserved_bytes for kv in caches) == loop.reserved_bytes <= _budget(profile)
    assert 0 < max(used) <= _budget(profile)


def _budget(profile: ModelProfile) -> int:
    """Room for the longest of the requests, not for all."""
    return profile.sequence.kv_bytes(200, _CHUNK)

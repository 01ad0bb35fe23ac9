"""Forward passes over KV caches: a chunk of one prompt, or new tokens of several sequences at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from moray.runtime.generation.kv import AS_PROMPT, AS_STEP, KVCache
from moray.runtime.model.attention_modules import is_all_fused
from moray.runtime.model.batch import BatchForward
from moray.runtime.model.model_modules import fused_step

_SMALL_ATTENTION = 128 << 10  # pairs of a token and a key, of one head


class Forward:
    """Computes tokens and notes them in their caches. After an error ``repair`` the caches or drop them."""

    def __init__(self, model: PreTrainedModel, batch: BatchForward | None) -> None:
        self._model, self._batch = model, batch
        self._num_threads = torch.get_num_threads()
        self._is_all_fused = is_all_fused(model)
        self._step = fused_step(model)

    @property
    def is_exact(self) -> bool:
        """Whether a prompt's tokens get the same bits however it is cut, into chunks of more than one."""
        return self._is_all_fused and self._model.device.type == "cpu"

    @property
    def takes_runs(self) -> bool:
        """Whether a sequence may have several tokens in ``rows``, each with the bits it has alone."""
        return self._batch is not None and self._batch.takes_runs

    @property
    def takes_batches(self) -> bool:
        return self._batch is not None

    def chunk(self, kv: KVCache, tokens: list[int]) -> torch.Tensor:
        """Logits [V] of the last of these tokens of one sequence. A single one is computed as a step."""
        self._give_torch_threads(len(tokens) * (len(kv.ids) + len(tokens)))
        logits = self._step(tokens[0], kv.cache) if self._step is not None and len(tokens) == 1 else None
        if logits is None:
            ids = torch.tensor([tokens], device=self._model.device)
            output = self._model(input_ids=ids, past_key_values=kv.cache, use_cache=True, logits_to_keep=1)
            logits = output.logits[0, -1]
        kv.note(tokens, AS_PROMPT if len(tokens) > 1 else AS_STEP)
        return logits

    def rows(self, runs: Sequence[tuple[KVCache, list[int]]]) -> list[torch.Tensor]:
        """Logits [T, V] of each run: T tokens of one sequence whose cache is not empty; T is 1 unless ``takes_runs``.

        Without a batch only one run.
        """
        if len(runs) == 1 and len(runs[0][1]) == 1:
            return [self.chunk(*runs[0])[None]]
        assert self._batch is not None
        self._give_torch_threads(sum(len(tokens) * (len(kv.ids) + len(tokens)) for kv, tokens in runs))
        lengths = [len(tokens) for _, tokens in runs]
        caches = [kv.cache for kv, tokens in runs for _ in tokens]
        logits = self._batch([token for _, tokens in runs for token in tokens], caches)
        for kv, tokens in runs:
            kv.note(tokens, AS_STEP)
        return list(logits.split(lengths))

    def whole(self, tokens: list[int]) -> torch.Tensor:
        """Logits [T, V] of a whole sequence, without a cache."""
        torch.set_num_threads(self._num_threads)
        logits: torch.Tensor = self._model(
            input_ids=torch.tensor([tokens], device=self._model.device), use_cache=False
        ).logits[0]
        return logits

    def _give_torch_threads(self, num_pairs: int) -> None:
        """All of them for a large attention of its own only: for less, waking them takes longer, and disturbs the
        kernels'.
        """
        is_large = num_pairs > _SMALL_ATTENTION and not self._is_all_fused
        torch.set_num_threads(self._num_threads if is_large else 1)


def repair(kv: KVCache) -> bool:
    """Take off what a failed pass left in a cache; False if it cannot be, and the cache is of no more use."""
    if kv.can_crop:
        kv.crop(len(kv.ids))
    return kv.can_crop

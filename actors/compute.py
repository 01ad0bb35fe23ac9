"""The compute actor: a shell around ``Runner`` whose experts lie in the hosts' arenas."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from moray.actors.guard import exit_with
from moray.actors.messages import ComputeConfig, ComputeReport, ComputeStats
from moray.cluster.arena_source import ArenaSource
from moray.runtime.generation.request import GenerationRequest, SamplingParams, TokenEvent
from moray.runtime.generation.runner import Runner
from moray.runtime.generation.text import Prompt
from moray.runtime.kernels.setup import set_num_threads
from moray.runtime.store.store import Store


class ComputeActor:
    """Loads the trunk when it is made; generates for any number of callers at once."""

    def __init__(self, config: ComputeConfig, node_id: Callable[[], str]) -> None:
        started = perf_counter()
        exit_with(config.owner_pid)
        set_num_threads(config.num_threads)
        self._store = Store.open(config.store_path)
        self._source = ArenaSource(self._store, config.hosts)
        self._runner = Runner(self._store, self._source, numerics=config.numerics, device=_resolve(config.device))
        self._report = ComputeReport(
            node_id=node_id(),
            pid=os.getpid(),
            device=str(self._runner.model.device),
            context_length=self._runner.context_length,
            has_tokenizer=self._runner.tokenizer is not None,
            arenas=self._source.arena_refs(),
            load_s=perf_counter() - started,
        )

    def report(self) -> ComputeReport:
        """Answers once the model is ready."""
        return self._report

    def generate(
        self,
        request_id: str,
        prompt: Prompt,
        max_new_tokens: int,
        sampling: SamplingParams,
        stop: tuple[str, ...],
    ) -> Iterator[TokenEvent]:
        """Stream a request's events. Raises RequestError."""
        ids = self._runner.encode(prompt)
        yield from self._runner.stream(GenerationRequest(request_id, ids, max_new_tokens, sampling, stop))

    def cancel(self, request_id: str) -> None:
        self._runner.cancel(request_id)

    def logits(self, token_ids: list[int]) -> npt.NDArray[np.float32]:
        """float32 [T, V]."""
        logits: npt.NDArray[np.float32] = self._runner.logits(token_ids).numpy()
        return logits

    def stats(self) -> ComputeStats:
        return ComputeStats(self._runner.stats(), tuple(self._source.describe()))

    def close(self) -> None:
        self._runner.close()
        self._source.close()
        self._store.close()


def _resolve(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"

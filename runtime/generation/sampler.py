"""Choosing the next token, with transformers' own logits processors."""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moray.runtime.generation.request import SamplingParams

_LEAST_TEMPERATURE = 1e-30  # below it, float32 would divide by zero


class Sampler:
    """One request's sampler: its own random state, so a batch never changes what a seed gives.

    ``num_drawn``: tokens that another sampler of the same seed has drawn: this one goes on after them.
    """

    def __init__(self, params: SamplingParams, num_drawn: int = 0) -> None:
        self._to_skip = num_drawn
        self._greedy = params.temperature == 0
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._processors = LogitsProcessorList()
        if self._greedy:
            return
        if params.temperature != 1:
            self._processors.append(TemperatureLogitsWarper(max(float(params.temperature), _LEAST_TEMPERATURE)))
        if params.top_k:
            self._processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self._processors.append(TopPLogitsWarper(params.top_p))

    def sample(self, ids: list[int], logits_V: torch.Tensor) -> int:
        """The next token after ``ids``, from float logits [V]. Greedy takes the lowest id among equals."""
        logits = logits_V.float().cpu()
        if self._greedy:
            return int(logits.argmax())
        logits = logits - logits.max()  # the same probabilities, and no overflow at a temperature near 0
        scores = self._processors(torch.LongTensor([ids]), logits[None])
        while self._to_skip:  # a draw takes as much of the random state whatever the probabilities
            torch.multinomial(torch.ones_like(scores), 1, generator=self._generator)
            self._to_skip -= 1
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))

"""Choosing the next token, with transformers' own logits processors."""

from __future__ import annotations

from collections import Counter

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moray.runtime.generation.request import SamplingParams, TokenLogProbs

_LEAST_TEMPERATURE = 1e-30  # below it, float32 would divide by zero


class Sampler:
    """One request's sampler: its own random state, so a batch never changes what a seed gives.

    ``num_prompt``: tokens at the beginning of ``ids`` that penalties do not count. ``num_drawn``: tokens that another
    sampler of the same seed has drawn: this one goes on after them.
    """

    def __init__(self, params: SamplingParams, *, num_prompt: int = 0, num_drawn: int = 0) -> None:
        self._params, self._num_counted, self._to_skip = params, num_prompt, num_drawn
        self._counts: Counter[int] = Counter()  # of generated tokens
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
        if self._params.shifts_logits:
            logits = self._shifted(ids, logits)
        if self._greedy:
            return int(logits.numpy().argmax())  # torch's takes a tenth of a millisecond for 150,000
        logits = logits - logits.max()  # the same probabilities, and no overflow at a temperature near 0
        scores = self._processors(torch.LongTensor([ids]), logits[None])
        while self._to_skip:  # a draw takes as much of the random state whatever the probabilities
            torch.multinomial(torch.ones_like(scores), 1, generator=self._generator)
            self._to_skip -= 1
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))

    def explain(self, token_id: int, logits_V: torch.Tensor) -> tuple[TokenLogProbs, ...]:
        """What the model thought of the token that was taken, if the request asked; from the logits of ``sample``."""
        num_top = self._params.num_log_probs
        if num_top is None:
            return ()
        log_probs = logits_V.float().cpu().log_softmax(dim=-1)
        top = log_probs.topk(min(num_top, len(log_probs)))
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return (TokenLogProbs(token_id, float(log_probs[token_id]), pairs),)

    def _shifted(self, ids: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        """Logits less the penalties of what was generated, plus the biases (OpenAI API reference)."""
        self._counts.update(ids[self._num_counted :])
        self._num_counted = len(ids)
        shifted, params = logits_V.clone(), self._params
        if self._counts and (params.frequency_penalty or params.presence_penalty):
            seen, counts = torch.tensor(list(self._counts)), torch.tensor(list(self._counts.values()))
            shifted[seen] -= counts * params.frequency_penalty + params.presence_penalty
        if params.logit_bias:
            token_ids, biases = zip(*params.logit_bias, strict=True)
            shifted.index_add_(0, torch.tensor(token_ids), torch.tensor(biases, dtype=torch.float32))
        return shifted

"""The step loop: prefill and decode steps over the model's forward, for several sequences at once.

One call of ``step`` computes a chunk of one prompt, if its turn has come, and one token of every decoding sequence, all
of them in one forward pass where the model can (continuous batching: Yu et al. 2022, Orca, section 4; chunked prefill:
Agrawal et al. 2024, Sarathi-Serve, section 4). Nothing here blocks or starts threads: ``runner.py`` drives it.
Requests join and leave between steps.

First come, first served. A request starts when there is room for its prompt and no other prompt is being computed, so
what follows with the same beginning finds it in a cache. If decoding sequences need more room than there is, the
youngest gives its own back and is computed again later: the oldest always goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from time import perf_counter

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from moray.runtime.errors import ClusterError, RequestError
from moray.runtime.evaluation import Ids, TokenScores
from moray.runtime.generation.detokenizer import Detokenizer, Tokenizer
from moray.runtime.generation.forward import Forward, repair
from moray.runtime.generation.kv import KVCache
from moray.runtime.generation.kv_pool import KVPool
from moray.runtime.generation.request import GenerationRequest, TokenEvent, joined
from moray.runtime.generation.sampler import Sampler
from moray.runtime.generation.scoring import score_logits
from moray.runtime.generation.sequence import Sequence
from moray.runtime.generation.speculation import PromptLookup
from moray.runtime.generation.stats import Counters, GenerationStats
from moray.runtime.generation.step_cost import Pacer
from moray.runtime.model.batch import BatchForward, describe_batch
from moray.runtime.model.families import context_length
from moray.runtime.planning.profile import GenerationLimits

Run = tuple[Sequence, list[int]]  # tokens to compute next; all but the first are proposed

_REPLAYED = 32  # tokens of a preempted sequence in one step


class StepLoop:
    """Owns the sequences and their KV caches. Not thread-safe: one thread calls it, but for ``check`` and ``stats``."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer | None,
        end_ids: frozenset[int],
        cache_kind: type[DynamicCache] = DynamicCache,
        limits: GenerationLimits | None = None,
        batch: BatchForward | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """``limits`` None: the model's own context and no limit of memory. ``batch`` None: sequences in turn."""
        self._config = model.config.get_text_config()
        limits = limits or GenerationLimits(context_length(self._config))
        limits = replace(limits, context_length=min(limits.context_length, context_length(self._config)))
        self._max_running = limits.max_running
        self._tokenizer, self._end_ids, self._clock = tokenizer, end_ids, clock
        self._forward, self._batching = Forward(model, batch), describe_batch(batch)
        self._pool = KVPool(self._config, limits, cache_kind)
        self._pacer = Pacer(limits.chunk, self._forward.is_exact)
        self._speculates = limits.speculation == "auto" and self._forward.takes_runs and self._forward.is_exact
        self._waiting: deque[Sequence] = deque()  # those preempted first
        self._running: dict[str, Sequence] = {}  # in the order of arrival, as all of them
        self._cancelled: set[str] = set()
        self._failures: dict[str, Exception] = {}
        self._counters = Counters()

    @property
    def context_length(self) -> int:
        return self._pool.context_length

    @property
    def reserved_bytes(self) -> int:
        """What all KV caches, running and kept, may grow to: never more than the limit."""
        return self._pool.reserved_bytes

    @property
    def caches(self) -> list[KVCache]:
        """All KV caches, running and kept."""
        return self._pool.caches

    @property
    def vocabulary_size(self) -> int:
        return int(self._config.vocab_size)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def stats(self) -> GenerationStats:
        """Thread-safe; numbers of a step in progress may be missing."""
        return GenerationStats(
            batching=self._batching,
            running=len(self._running),
            waiting=len(self._waiting),
            **asdict(self._counters),
            kv_reserved_bytes=self._pool.reserved_bytes,
            kv_limit_bytes=self._pool.limit_bytes,
        )

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError if the request can never be served. Thread-safe: reads constants only."""
        length = len(request.prompt_ids) + len(request.generated)
        if length >= self.context_length:
            raise RequestError(self._too_long(length))
        self.check_ids(request.prompt_ids)
        self.check_ids(token_id for token_id, _ in request.sampling.logit_bias)
        self.check_ids(request.generated)
        if request.stop and self._tokenizer is None:
            raise RequestError("this store has no tokenizer, so a text cannot stop a request; leave out stop")

    def check_ids(self, ids: Iterable[int]) -> None:
        """Raise RequestError if an id is not a token of the model."""
        bad = [i for i in ids if not 0 <= i < self.vocabulary_size]
        if bad:
            raise RequestError(f"token id {bad[0]} is not in the vocabulary of {self.vocabulary_size}")

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Its id must not be in use."""
        self.check(request)
        assert request.request_id not in self._running
        most = self.context_length - len(request.prompt_ids)
        request = replace(request, max_new_tokens=min(request.max_new_tokens, most))
        detokenizer = Detokenizer(self._tokenizer, request.prompt_ids, request.stop)
        lookup = PromptLookup() if self._speculates else None
        sampler = Sampler(request.sampling, num_prompt=len(request.prompt_ids), num_drawn=len(request.generated))
        self._waiting.append(Sequence(request, detokenizer, sampler, self._end_ids, lookup=lookup))

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; unknown ids are ignored, they may just have ended."""
        if request_id in self._running or any(s.request.request_id == request_id for s in self._waiting):
            self._cancelled.add(request_id)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Advance. Returns what happened, in the order of arrival of the requests."""
        events = self._drop_cancelled()
        self._grow()
        prompt = self._next_prompt()
        decoding = [sequence for sequence in self._running.values() if sequence is not prompt]
        first: list[TokenEvent] = []
        if prompt is not None and self._pacer.is_due(len(decoding)):
            first = self._prefill(prompt, len(decoding))
        return events + self._decode(decoding) + first

    def take_failures(self) -> dict[str, Exception]:
        """The requests that steps ended since the last call, by what made them fail."""
        failures, self._failures = self._failures, {}
        return failures

    def abort(self) -> None:
        """Drop every request, with their caches."""
        for sequence in self._running.values():
            self._pool.close(sequence.kv, keep=False)
        self._waiting.clear()
        self._running.clear()
        self._cancelled.clear()
        self._failures.clear()

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """float32 [T, V] of the whole sequence, computed at once, beside whatever is running."""
        return self._forward.whole(token_ids).float().cpu()

    @torch.inference_mode()
    def score(self, token_ids: list[int], candidates: Ids | None = None) -> TokenScores:
        """Scores of a window of T > 1 tokens, computed at once, beside whatever is running. Holds one [T, V]."""
        logits = self._forward.whole(token_ids)[:-1]
        return score_logits(logits, np.array(token_ids[1:], dtype=np.int32), candidates)

    def validate(self) -> None:
        """What holds between steps."""
        self._pool.validate()
        assert len(self._running) <= self._max_running
        assert {id(s.kv) for s in self._running.values()} == {id(kv) for kv in self._pool.open_caches}
        assert all(not s.kv.ids for s in self._waiting)
        for sequence in self._running.values():
            assert sequence.kv.ids == sequence.ids[: len(sequence.kv.ids)] and sequence.pending
        assert not any(sequence.is_prompt for sequence in list(self._running.values())[:-1])

    def _too_long(self, length: int) -> str:
        own, planned = context_length(self._config), self.context_length
        if planned == own:
            holds, remedy = f"the model's context holds {own}", "shorten the prompt"
        else:
            holds = f"the context planned for this machine's memory holds {planned} (the model's own {own})"
            remedy = (
                f"shorten the prompt, or start the engine with a larger --context, up to {own}, and the memory for it"
            )
        return f"the prompt has {length} tokens, {holds} with at least one to generate; {remedy}"

    # ------------------------------------------------------------------------------ who runs

    def _grow(self) -> None:
        """Give every decoding sequence room for its next token, the oldest first, at the cost of the youngest."""
        for sequence in list(self._running.values()):
            if sequence.request.request_id not in self._running or sequence.is_prompt:
                continue
            needed = len(sequence.kv.ids) + 1
            while not self._pool.grow(sequence.kv, needed, sequence.most_tokens, is_generous=not self._waiting):
                assert len(self._running) > 1, "a sequence that is alone always has room"
                youngest = next(reversed(self._running.values()))
                self._preempt(youngest)
                if youngest is sequence:
                    break

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.request.request_id]
        self._pool.close(sequence.kv, keep=False)
        sequence.stop()
        self._waiting.appendleft(sequence)
        self._counters.preemptions += 1

    def _next_prompt(self) -> Sequence | None:
        """The sequence whose prompt is being computed: one from the queue if the last is done and the next has room."""
        last = next(reversed(self._running.values()), None)
        if last is not None and last.is_prompt:
            return last
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            kv = self._pool.open(sequence.ids, sequence.kinds, is_new=not sequence.started_s)
            if kv is None:
                return None
            self._waiting.popleft()
            self._running[sequence.request.request_id] = sequence
            self._counters.prompt_tokens_reused += sequence.start(kv)
            if sequence.is_prompt:
                return sequence
        return None

    def _drop_cancelled(self) -> list[TokenEvent]:
        cancelled, self._cancelled = self._cancelled, set()
        events = []
        for sequence in [s for s in self._running.values() if s.request.request_id in cancelled]:
            events.append(sequence.cancel())
            self._retire(sequence)
        for sequence in [s for s in self._waiting if s.request.request_id in cancelled]:
            self._waiting.remove(sequence)
            events.append(sequence.cancel())
        return events

    def _retire(self, sequence: Sequence) -> None:
        del self._running[sequence.request.request_id]
        self._pool.close(sequence.kv, keep=True)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        del self._running[sequence.request.request_id]
        self._pool.close(sequence.kv, keep=False)
        self._failures[sequence.request.request_id] = error

    # ---------------------------------------------------------------------- what is computed

    def _prefill(self, sequence: Sequence, num_decoding: int) -> list[TokenEvent]:
        """A chunk of a prompt, or all of it where it cannot be cut; an event at its end."""
        tokens = sequence.next_chunk(self._pacer.chunk(num_decoding) if sequence.kv.can_chunk else None)
        started = self._clock()
        try:
            logits = self._forward.chunk(sequence.kv, tokens)
        except Exception as error:
            self._fail(sequence, error)
            return []
        self._pacer.note_chunk(len(tokens), self._clock() - started, 1 + len(self._waiting), num_decoding)
        self._counters.prompt_tokens_computed += len(tokens)
        return self._push(sequence, [], logits[None])

    def _decode(self, sequences: list[Sequence]) -> list[TokenEvent]:
        """The next token of each, computed at once where the model can."""
        if not sequences:
            return []
        started = self._clock()
        runs = [(sequence, self._next_tokens(sequence, len(sequences))) for sequence in sequences]
        groups = [runs] if self._forward.takes_batches else [[run] for run in runs]
        events = []
        for group in groups:
            for (sequence, tokens), logits in self._compute(group):
                num_proposed = max(0, len(sequence.kv.ids) - len(sequence.ids))
                proposed = tokens[len(tokens) - num_proposed :]
                events += self._push(sequence, proposed, logits[-1 - num_proposed :])
        num_rows = sum(len(tokens) for _, tokens in runs)
        self._pacer.note_step(num_rows, self._clock() - started)
        self._counters.note_step(len(runs), num_rows)
        return events

    def _next_tokens(self, sequence: Sequence, num_sequences: int) -> list[int]:
        """The known token to compute next, and what may follow it; after a preemption several known ones."""
        tokens = sequence.pending
        if len(tokens) > 1:
            return sequence.next_steps(_REPLAYED if self._forward.takes_runs else 1)
        if sequence.lookup is None:
            return tokens
        most = min(sequence.kv.reserved_tokens, sequence.most_tokens) - len(sequence.ids)
        return [*tokens, *sequence.lookup.propose(sequence.ids, most, self._pacer.steps, num_sequences)]

    def _compute(self, runs: list[Run]) -> list[tuple[Run, torch.Tensor]]:
        """Each run with its logits, but those that could not be computed, whose sequences end."""
        try:
            logits = self._forward.rows([(sequence.kv, tokens) for sequence, tokens in runs])
            return list(zip(runs, logits, strict=True))
        except Exception as error:
            if len(runs) == 1 or isinstance(error, ClusterError):
                for sequence, _ in runs:
                    self._fail(sequence, error)
                return []
            sound = []
            for run in runs:
                if repair(run[0].kv):
                    sound.append(run)
                else:
                    self._fail(run[0], error)
        return [result for run in sound for result in self._compute([run])]  # which of them was it?

    def _push(self, sequence: Sequence, proposed: list[int], logits_TV: torch.Tensor) -> list[TokenEvent]:
        """Sample after each row as long as the proposed tokens are right. Nothing while known tokens are pending."""
        if sequence.pending:
            return []
        event: TokenEvent | None = None
        num_right = 0
        try:
            for row, logits_V in enumerate(logits_TV):
                pushed = sequence.take(logits_V)
                event = pushed if event is None else joined(event, pushed)
                if event.finished or proposed[row : row + 1] != sequence.ids[-1:]:
                    break
                num_right += 1
        except Exception as error:  # of a logits processor: no other sequence's concern
            self._fail(sequence, error)
            return [] if event is None else [event]
        assert event is not None
        if proposed:
            sequence.kv.crop(len(sequence.ids) - 1)
            self._note_speculation(sequence, len(proposed), num_right)
        if event.finished:
            self._retire(sequence)
        return [event]

    def _note_speculation(self, sequence: Sequence, num_proposed: int, num_right: int) -> None:
        assert sequence.lookup is not None
        sequence.lookup.note(num_proposed, num_right)
        self._counters.speculated += num_proposed
        self._counters.speculated_accepted += num_right

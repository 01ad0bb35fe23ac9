"""What the step loop did, as numbers; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """A snapshot. Tokens, steps and preemptions are counted since the start."""

    batching: str  # how sequences share a forward pass: "fused", "padded", "in turn"
    running: int
    waiting: int  # those preempted included
    preemptions: int
    prompt_tokens_computed: int  # those computed again after a preemption included
    prompt_tokens_reused: int  # of other requests' caches
    decode_steps: int
    decode_rows: int  # tokens computed in them: decode_rows / decode_steps is the mean batch
    largest_batch: int  # sequences in one step
    speculated: int  # tokens proposed and computed ahead
    speculated_accepted: int  # of them, those that were right
    kv_reserved_bytes: int  # of all KV caches, running and kept
    kv_limit_bytes: int | None


@dataclass(slots=True)
class Counters:
    """What a step loop counts."""

    preemptions: int = 0
    prompt_tokens_computed: int = 0
    prompt_tokens_reused: int = 0
    decode_steps: int = 0
    decode_rows: int = 0
    largest_batch: int = 0
    speculated: int = 0
    speculated_accepted: int = 0

    def note_step(self, num_sequences: int, num_rows: int) -> None:
        self.decode_steps += 1
        self.decode_rows += num_rows
        self.largest_batch = max(self.largest_batch, num_sequences)

"""What a model's trunk takes in memory, as numbers: measured once for a store (measure.py), used by plans and budgets.

Tokens of one sequence: T are computed in one forward pass, N are in the cache after it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

CHUNKS = (128, 512, 1024, 2048)  # tokens of a prompt in one forward pass: what plans choose from
CHUNK = 512  # if nothing asks for more or less
MAX_RUNNING = 32  # sequences at once

Speculation = Literal["auto", "off"]


@dataclass(frozen=True, slots=True)
class SequenceMemory:
    """Bytes of one sequence's KV cache.

    ``windows``: (tokens, bytes a token) of layers that keep so many tokens. Such a layer holds the tokens of the last
    forward pass, too, until the next one.
    """

    fixed_bytes: int  # states of linear attention and the like
    bytes_per_token: int  # of layers that keep every token
    windows: tuple[tuple[int, int], ...]
    can_chunk: bool  # whether prompts may be computed in pieces
    can_batch: bool = True  # whether it can be decoded in one forward pass with others, if a trial shows it (batch.py)

    def kv_bytes(self, tokens: int, chunk: int) -> int:
        """Most bytes of a sequence of ``tokens``, its prompt fed in pieces of ``chunk`` tokens."""
        step = chunk if self.can_chunk else tokens
        kept = sum(per_token * min(tokens, window - 1 + step) for window, per_token in self.windows)
        return self.fixed_bytes + self.bytes_per_token * tokens + kept


@dataclass(frozen=True, slots=True)
class Workspace:
    """Most bytes of a forward pass besides weights and caches: a + b T + c N + d T N."""

    constant: float
    per_token: float
    per_length: float
    per_pair: float

    def num_bytes(self, tokens: int, length: int) -> int:
        pairs = tokens * length
        total = self.constant + self.per_token * tokens + self.per_length * length + self.per_pair * pairs
        return max(0, math.ceil(total))


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A store's model without its experts."""

    trunk_bytes: int  # as loaded: packed weights as stored, all others in the type that is computed with
    context_length: int  # the model's own limit
    sequence: SequenceMemory
    workspace: Workspace
    bytes_per_token: int = 0  # of the trunk's weights, read in a forward pass of one token
    top_k: tuple[int, ...] = ()  # experts a token, by MoE layer

    def chunk_of(self, chunk: int, length: int) -> int:
        """Tokens in the largest forward pass of a sequence of ``length`` tokens."""
        return min(chunk, length) if self.sequence.can_chunk else length

    def workspace_bytes(self, chunk: int, length: int) -> int:
        if self.sequence.can_chunk:
            length = max(length, CHUNKS[-1])  # measured from there on
        return self.workspace.num_bytes(self.chunk_of(chunk, length), length)

    def encode(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """What the step loop keeps to. ``kv_bytes``: of all KV caches, running and kept; None: no limit.

    ``max_running``: sequences that run at once, memory permitting. ``speculation``: whether tokens are computed ahead
    where it is measured to pay; no output depends on it.
    """

    context_length: int
    chunk: int = CHUNK
    kv_bytes: int | None = None
    sequence: SequenceMemory = SequenceMemory(0, 0, (), can_chunk=True)
    max_running: int = MAX_RUNNING
    speculation: Speculation = "auto"

    def sequence_bytes(self, tokens: int) -> int:
        """What is reserved for a sequence of so many tokens."""
        return self.sequence.kv_bytes(tokens, self.chunk)


def decode_profile(text: str) -> ModelProfile:
    """Raises ValueError, KeyError or TypeError for anything but what ``encode`` made."""
    document: Mapping[str, Any] = json.loads(text)
    sequence = dict(document["sequence"])
    windows = tuple((int(tokens), int(size)) for tokens, size in sequence.pop("windows"))
    numbers = {name: int(document[name]) for name in ("trunk_bytes", "context_length", "bytes_per_token")}
    return ModelProfile(
        **numbers,
        sequence=SequenceMemory(windows=windows, **sequence),
        workspace=Workspace(**document["workspace"]),
        top_k=tuple(int(count) for count in document["top_k"]),
    )

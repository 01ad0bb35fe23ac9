"""Prompts of consecutive token ids along replayed texts, and a side that must walk on along them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from peer_sides import Run, Side


class ReplayPrompts:
    """Places in texts, each with another first token, so that nothing of an earlier request can be used again."""

    def __init__(self, texts: Sequence[range], seed: int = 0) -> None:
        self._texts, self._random = list(texts), random.Random(seed)
        self._used: set[int] = set()
        self._num_made = 0

    def make(self, length: int, count: int = 1) -> list[int]:
        """``length`` ids that ``count`` more follow, from the texts in turns."""
        text = self._texts[self._num_made % len(self._texts)]
        self._num_made += 1
        starts = [start for start in text[: len(text) - length - count] if start not in self._used]
        if not starts:
            raise SystemExit(f"no place is left in a text of {len(text)} tokens for {length} and {count} more")
        start = self._random.choice(starts)
        self._used.add(start)
        return list(range(start, start + length))


class Walking:
    """A side whose tokens are checked: after id t comes t + 1."""

    def __init__(self, side: Side) -> None:
        self._side, self.name = side, side.name

    def generate(self, prompt: Sequence[int], count: int) -> Run:
        run = self._side.generate(prompt, count)
        expected = tuple(range(prompt[-1] + 1, prompt[-1] + 1 + count))
        if run.ids != expected:
            wrong = next(i for i, (a, b) in enumerate(zip(run.ids, expected, strict=True)) if a != b)
            raise SystemExit(f"{self.name}: after token {expected[wrong] - 1} came {run.ids[wrong]}")
        return run

    def cpu_s(self) -> float:
        return self._side.cpu_s()

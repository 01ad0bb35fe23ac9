"""What forward passes take, measured on the running system, and how prompts and decoding share the time by it. Pure."""

from __future__ import annotations

_KEEP = 0.95  # of a measurement's weight at the next one
_OUTLIER = 8.0  # times what is expected: more is counted as that, such as a process that was suspended

_LEAST_SHARE, _MOST_SHARE = 0.5, 0.75  # of the time, for prompts while others decode
_STALL_STEPS = 4  # decode steps that a chunk of a prompt may take the time of
_FIRST_CHUNK, _LEAST_CHUNK = 64, 16  # tokens: before anything is measured, and at least


class StepCost:
    """Seconds of a forward pass as a line in its tokens: least squares over the last ones, older ones counting less."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        expected = self.seconds(tokens)
        if expected > 0:
            seconds = min(seconds, _OUTLIER * expected)
        added = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        sums = (self._n, self._x, self._y, self._xx, self._xy)
        self._n, self._x, self._y, self._xx, self._xy = (
            _KEEP * old + new for old, new in zip(sums, added, strict=True)
        )

    def line(self) -> tuple[float, float]:
        """Seconds of a pass and of each of its tokens, none negative; zeros before anything is measured."""
        if not self._n:
            return 0.0, 0.0
        spread = self._n * self._xx - self._x**2
        if spread <= 1e-6 * self._n * self._xx:  # all of one size
            return 0.0, self._y / self._x
        slope = (self._n * self._xy - self._x * self._y) / spread
        fixed = (self._y - slope * self._x) / self._n
        if slope < 0:
            return self._y / self._n, 0.0
        return (fixed, slope) if fixed >= 0 else (0.0, self._xy / self._xx)

    def seconds(self, tokens: int) -> float:
        fixed, slope = self.line()
        return fixed + slope * tokens


class Pacer:
    """When the next chunk of a prompt is computed, and how large it is, while other sequences decode.

    Prompts get a share of the time: as many parts as there are prompts to so many sequences that decode, but half at
    least and three quarters at most. So decoding is never slower than a quarter of its speed for long, and a chunk
    takes no longer than four decode steps, unless a smaller one would spend most of its time on what every pass costs.
    """

    def __init__(self, chunk: int, can_shrink: bool) -> None:
        """``can_shrink``: whether the size of chunks changes no bit of the results."""
        self._most, self._can_shrink = max(chunk, 2), can_shrink
        self._prompts, self._steps = StepCost(), StepCost()
        self._owed_s = 0.0  # to those that decode, before the next chunk

    def is_due(self, num_decoding: int) -> bool:
        if not num_decoding:
            self._owed_s = 0.0
        return self._owed_s <= 0

    def chunk(self, num_decoding: int) -> int:
        """Tokens of the next chunk, at most."""
        if not num_decoding or not self._can_shrink:
            return self._most
        fixed, per_token = self._prompts.line()
        stall = _STALL_STEPS * self._steps.seconds(num_decoding)
        if not per_token or not stall:
            return min(self._most, _FIRST_CHUNK)
        tokens = int(max(stall - fixed, fixed) / per_token) // _LEAST_CHUNK * _LEAST_CHUNK
        return min(self._most, max(tokens, _LEAST_CHUNK))

    def note_chunk(self, tokens: int, seconds: float, num_prompts: int, num_decoding: int) -> None:
        self._prompts.note(tokens, seconds)
        if num_decoding:
            share = min(max(num_prompts / (num_prompts + num_decoding), _LEAST_SHARE), _MOST_SHARE)
            self._owed_s += seconds * (1 - share) / share

    def note_step(self, rows: int, seconds: float) -> None:
        """A decode step of so many rows."""
        self._steps.note(rows, seconds)
        self._owed_s = max(-seconds, self._owed_s - seconds)  # what it is too much counts next time

    @property
    def steps(self) -> StepCost:
        """Of decode steps, in rows."""
        return self._steps

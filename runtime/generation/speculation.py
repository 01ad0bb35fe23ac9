"""Prompt-lookup speculation: what followed the last tokens before is computed ahead and kept where it is right. Pure.

A token that is computed ahead is only taken if the sampler, given the same logits as without speculation, chooses it:
the output is the same, greedy or not. Prompt lookup: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding;
verification in one pass: Leviathan et al. 2023, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from moray.runtime.generation.step_cost import StepCost

_NGRAM = 3  # tokens that must be the same
_MOST = 8  # tokens proposed at once
_TRIAL = 2  # tokens computed ahead to find out whether it pays
_RETRY = 64  # proposals left alone before it is tried again
_PRIOR, _KEEP = 4.0, 0.9  # proposals that the first guess counts for; weight of what was at the next one


class PromptLookup:
    """One sequence's proposals, and how often they were right."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where its last occurrence but the present one ends
        self._indexed = 0
        self._right, self._tried = _PRIOR / 2, _PRIOR
        self._ignored = _RETRY

    def propose(self, ids: list[int], most: int, cost: StepCost, num_sequences: int) -> Sequence[int]:
        """Tokens that may follow ``ids``, at most ``most``: as many as are worth their computing, often none.

        ``ids`` only grow from call to call. ``cost``: of a step in its rows, shared by ``num_sequences``.
        """
        for start in range(self._indexed, len(ids) - _NGRAM):
            self._after[tuple(ids[start : start + _NGRAM])] = start + _NGRAM
        self._indexed = max(self._indexed, len(ids) - _NGRAM)
        at = self._after.get(tuple(ids[-_NGRAM:]))
        if at is None or most < 1:
            return ()
        count = num_worthwhile(self._right / self._tried, cost, num_sequences)
        self._ignored += 1
        if not count and self._ignored > _RETRY:
            count = _TRIAL
        if count:
            self._ignored = 0
        return ids[at : at + min(count, most)]

    def note(self, num_proposed: int, num_right: int) -> None:
        """The first ``num_right`` of the proposed tokens were taken."""
        num_tried = min(num_right + 1, num_proposed)  # what follows a wrong one was not tried
        self._right = _KEEP * self._right + num_right
        self._tried = _KEEP * self._tried + num_tried


def num_worthwhile(right: float, cost: StepCost, num_sequences: int) -> int:
    """How many tokens to compute ahead: another one is worth it while what it saves is more than a row costs.

    ``right``: the share of proposed tokens that are. A token saves a step's time divided by its sequences.
    """
    _, per_row = cost.line()
    saved, count = cost.seconds(num_sequences) / num_sequences, 0
    while count < _MOST and right ** (count + 1) * saved > per_row:
        count += 1
    return count

"""A layer call whose experts are computed in parts."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from moray.runtime.arrays import Floats, Ints
from moray.runtime.kernels import moe, ops
from moray.runtime.kernels.ops import Grouping

# Memory of calls that have ended. A prompt's outputs are so large that the kernel would zero new pages at every layer.
_spare: list[Floats] = []


class Pairs:
    """Outputs of a layer's (token, expert) pairs, unweighted, collected until all are there."""

    def __init__(self, grouping: Grouping, x_TH: torch.Tensor) -> None:
        self._grouping, self._like = grouping, x_TH
        self.rows: Ints = np.empty(0, dtype=np.int64)  # of the last ``part``, among all pairs

    @cached_property
    def y_PH(self) -> Floats:
        """Of all pairs; rows whose turn has not come have no meaning."""
        shape = len(self._grouping.token_of_pair), self._like.shape[1]
        memory = _spare.pop() if _spare else np.empty(0, dtype=np.float32)
        if memory.size < shape[0] * shape[1]:
            memory = np.empty(shape[0] * shape[1], dtype=np.float32)
        self._memory = memory
        return memory[: shape[0] * shape[1]].reshape(shape)

    def part(self, experts: Ints) -> tuple[Grouping, torch.Tensor]:
        """A grouping of some experts' pairs alone, whose output is one row a pair, and its weights: ones.

        ``experts``: sorted positions in the list of active ones.
        """
        whole = self._grouping
        self.rows, starts, tokens = moe.pairs_of(experts, whole.starts, whole.token_of_pair)
        positions = np.arange(len(self.rows), dtype=np.int64)[:, None]
        ones = torch.ones(len(self.rows), 1, dtype=torch.float32, device=self._like.device)
        return Grouping(whole.active[experts], starts, tokens, positions), ones

    def keep(self, y_PH: torch.Tensor) -> None:
        """What was computed of the last ``part``, unless it was written to ``rows`` of ``y_PH``."""
        self.y_PH[self.rows] = y_PH.to("cpu", torch.float32).numpy()

    def put(self, pairs: Ints, y_PH: Floats) -> None:
        """Outputs of pairs by their numbers."""
        self.y_PH[pairs] = y_PH

    def combine(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sums. Ends the use of this."""
        weights = weights_TK.cpu().float().contiguous().numpy()
        summed = torch.from_numpy(ops.combine(self.y_PH, self._grouping, weights)).to(self._like)
        _spare.append(self._memory)
        del self.y_PH, self._memory
        return summed

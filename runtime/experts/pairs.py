"""A layer call whose experts are computed in parts."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from moray.runtime.arrays import Floats, Ints
from moray.runtime.kernels import moe, ops
from moray.runtime.kernels.ops import Grouping


class Pairs:
    """Outputs of a layer's (token, expert) pairs, unweighted, collected until all are there."""

    def __init__(self, grouping: Grouping, x_TH: torch.Tensor) -> None:
        self._grouping, self._like = grouping, x_TH
        self._rows: Ints = np.empty(0, dtype=np.int64)

    @cached_property
    def _y_PH(self) -> Floats:
        return np.empty((len(self._grouping.token_of_pair), self._like.shape[1]), dtype=np.float32)

    def part(self, experts: Ints) -> tuple[Grouping, torch.Tensor]:
        """A grouping of some experts' pairs alone, whose output is one row a pair, and its weights: ones.

        ``experts``: sorted positions in the list of active ones.
        """
        whole = self._grouping
        self._rows, starts, tokens = moe.pairs_of(experts, whole.starts, whole.token_of_pair)
        positions = np.arange(len(self._rows), dtype=np.int64)[:, None]
        ones = torch.ones(len(self._rows), 1, dtype=torch.float32, device=self._like.device)
        return Grouping(whole.active[experts], starts, tokens, positions), ones

    def keep(self, y_PH: torch.Tensor) -> None:
        """What was computed of the last ``part``."""
        self._y_PH[self._rows] = y_PH.to("cpu", torch.float32).numpy()

    def put(self, pairs: Ints, y_PH: Floats) -> None:
        """Outputs of pairs by their numbers."""
        self._y_PH[pairs] = y_PH

    def combine(self, weights_TK: torch.Tensor) -> torch.Tensor:
        weights = weights_TK.cpu().float().contiguous().numpy()
        return torch.from_numpy(ops.combine(self._y_PH, self._grouping, weights)).to(self._like)

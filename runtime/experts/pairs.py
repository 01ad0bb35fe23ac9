"""A layer call whose experts are computed in parts."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from moray.runtime.experts.source import Ints
from moray.runtime.kernels import ops
from moray.runtime.kernels.ops import Grouping


class Pairs:
    """Outputs of a layer's (token, expert) pairs, unweighted, collected until all are there."""

    def __init__(self, grouping: Grouping, x_TH: torch.Tensor) -> None:
        self._grouping, self._like = grouping, x_TH
        self._rows: Ints = np.empty(0, dtype=np.int64)

    @cached_property
    def _counts(self) -> Ints:
        return np.diff(self._grouping.starts)

    @cached_property
    def _expert_of_pair(self) -> Ints:
        return np.repeat(np.arange(len(self._grouping.active)), self._counts)

    @cached_property
    def _y_PH(self) -> npt.NDArray[np.float32]:
        return np.empty((len(self._grouping.token_of_pair), self._like.shape[1]), dtype=np.float32)

    def part(self, experts: Ints) -> tuple[Grouping, torch.Tensor]:
        """A grouping of some experts' pairs alone, whose output is one row a pair, and its weights: ones.

        ``experts``: sorted positions in the list of active ones.
        """
        whole = self._grouping
        is_mine = np.zeros(len(whole.active), dtype=np.bool_)
        is_mine[experts] = True
        self._rows = np.flatnonzero(is_mine[self._expert_of_pair])
        starts = np.zeros(len(experts) + 1, dtype=np.int64)
        np.cumsum(self._counts[experts], out=starts[1:])
        positions = np.arange(len(self._rows), dtype=np.int64)[:, None]
        ones = torch.ones(len(self._rows), 1, dtype=torch.float32, device=self._like.device)
        return Grouping(whole.active[experts], starts, whole.token_of_pair[self._rows], positions), ones

    def keep(self, y_PH: torch.Tensor) -> None:
        """What was computed of the last ``part``."""
        self._y_PH[self._rows] = y_PH.to("cpu", torch.float32).numpy()

    def put(self, pairs: Ints, y_PH: npt.NDArray[np.float32]) -> None:
        """Outputs of pairs by their numbers."""
        self._y_PH[pairs] = y_PH

    def combine(self, weights_TK: torch.Tensor) -> torch.Tensor:
        weights = weights_TK.cpu().float().contiguous().numpy()
        return torch.from_numpy(ops.combine(self._y_PH, self._grouping, weights)).to(self._like)

"""Predictions from a file: for benchmarks whose models replay recorded choices, and would predict them all.

MORAY_REPLAYED_PREDICTIONS names an .npz file with ``ahead1``, ``ahead2``, ...: int16 [V, L, K], the experts that
layer l - d, at token id t, is to predict for layer l; -1 for none (benchmarks/replay.py writes it).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moray.runtime.prefetch.predictor import Prediction

VARIABLE = "MORAY_REPLAYED_PREDICTIONS"
_NAME = "ahead"


class ReplayedPredictor:
    """In place of ``Predictor``, for token ids as the model's embedding is given them."""

    def __init__(self, model: nn.Module, path: Path, depth: int) -> None:
        with np.load(path) as arrays:
            found = {int(name.removeprefix(_NAME)): arrays[name] for name in arrays.files if name.startswith(_NAME)}
        self._ahead = {distance: found[distance] for distance in sorted(found) if distance <= depth}
        self._ids = np.empty(0, dtype=np.int64)
        model.get_input_embeddings().register_forward_pre_hook(self._note_ids)  # type: ignore[operator]

    def predict(self, layer: int, x_TH: torch.Tensor) -> list[Prediction]:
        predictions = []
        for distance, experts_VLK in self._ahead.items():
            target = layer + distance
            if target >= experts_VLK.shape[1]:
                continue
            experts, counts = np.unique(experts_VLK[self._ids, target], return_counts=True)
            known = experts >= 0
            ids = experts[known][np.argsort(-counts[known], kind="stable")].astype(np.int64)
            predictions.append(Prediction(target, ids))
        return predictions

    def _note_ids(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._ids = args[0].reshape(-1).cpu().numpy()


def replayed_file() -> Path | None:
    """The file that the environment names."""
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None

"""ERNIE 4.5 VL: a second set of experts in each layer, which only images and videos pass, is left out."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import nn

from moray.runtime.model.adapters import Adapter


def _classes(modeling: ModuleType) -> dict[str, type[nn.Module]]:
    class Block(modeling.Ernie4_5_VLMoeMoeBlock):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.vision_moe = None

    return {"Ernie4_5_VLMoeMoeBlock": Block}


ADAPTER = Adapter(_classes)

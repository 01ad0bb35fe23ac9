"""Step 3.7: its experts have the interface's form, they only lack the decorator."""

from __future__ import annotations

from types import ModuleType

from torch import nn
from transformers.integrations.moe import use_experts_implementation

from moray.runtime.model.adapters import Adapter


def _classes(modeling: ModuleType) -> dict[str, type[nn.Module]]:
    @use_experts_implementation
    class Experts(modeling.Step3p7Experts):  # type: ignore[misc, name-defined]
        pass

    return {"Step3p7Experts": Experts}


ADAPTER = Adapter(_classes)

"""LongCat-Flash: the router may also choose *identity experts*, which have no weights."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from moray.runtime.model.adapters import Adapter


def _classes(modeling: ModuleType) -> dict[str, type[nn.Module]]:
    @use_experts_implementation
    class Experts(modeling.LongcatFlashExperts):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.num_experts = self.num_routed_experts
            # transformers' own has rows for the identity experts, too, and never uses them
            shape = self.num_experts, 2 * self.intermediate_size, self.hidden_size
            self.register_parameter("gate_up_proj", nn.Parameter(torch.empty(shape)))

    class Block(modeling.LongcatFlashMoE):  # type: ignore[misc, name-defined]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            _, weights_TK, ids_TK = self.router(hidden_states)
            x_TH = hidden_states.view(-1, hidden_states.shape[-1])
            is_identity_TK = ids_TK >= self.experts.num_experts  # such pairs are skipped by the experts function
            identity_T1 = (weights_TK * is_identity_TK).sum(-1, keepdim=True).to(x_TH.dtype)
            out_TH: torch.Tensor = self.experts(x_TH, ids_TK, weights_TK) + identity_T1 * x_TH
            return out_TH.view(hidden_states.shape)

    return {"LongcatFlashExperts": Experts, "LongcatFlashMoE": Block}


ADAPTER = Adapter(_classes)

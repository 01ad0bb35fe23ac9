"""DBRX: all experts of a layer in three flat matrices [experts * I, H]; the third is used transposed."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.core_model_loading import Concatenate, Transpose, WeightConverter
from transformers.integrations.moe import use_experts_implementation

from moray.runtime.model.adapters import Adapter

_FLAT = re.compile(r"\.ffn\.experts\.mlp\.(w1|v1|w2)$")


def _classes(modeling: ModuleType) -> dict[str, type[nn.Module]]:
    @use_experts_implementation
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = config.moe_num_experts
            width, columns = config.ffn_hidden_size, config.hidden_size
            self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, columns))
            self.down_proj = nn.Parameter(torch.empty(self.num_experts, columns, width))
            self.act_fn = ACT2FN[config.ffn_act_fn.get("name", "silu")]

        def forward(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
            raise AssertionError("replaced by the experts implementation")

    class Block(modeling.DbrxFFN):  # type: ignore[misc, name-defined]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            weights_TK, ids_TK = self.route_tokens_to_experts(self.router(hidden_states))
            out: torch.Tensor = self.experts(hidden_states.reshape(-1, hidden_states.shape[-1]), ids_TK, weights_TK)
            return out.view(hidden_states.shape)

    return {"DbrxExperts": Experts, "DbrxFFN": Block}


def _reshape(config: PreTrainedConfig, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[experts * I, H] -> [experts, I, H]. A shape that does not fit is left alone: it is refused later."""
    num_experts = config.ffn_config.moe_num_experts
    if not _FLAT.search(key) or len(shape) != 2 or shape[0] % num_experts:
        return shape
    return num_experts, shape[0] // num_experts, shape[1]


ADAPTER = Adapter(
    _classes,
    conversions=(
        WeightConverter(["experts.mlp.w1", "experts.mlp.v1"], "experts.gate_up_proj", [Concatenate(dim=1)]),
        WeightConverter("experts.mlp.w2", "experts.down_proj", [Transpose(1, 2)]),
    ),
    reshape=_reshape,
)

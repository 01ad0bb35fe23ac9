"""Llama 4: the router's score scales an expert's input, not its output, and transformers computes every expert."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from moray.runtime.model.adapters import Adapter


def _classes(modeling: ModuleType) -> dict[str, type[nn.Module]]:
    @use_experts_implementation(is_transposed=True)
    class Experts(modeling.Llama4TextExperts):  # type: ignore[misc, name-defined]
        pass

    class Block(modeling.Llama4TextMoe):  # type: ignore[misc, name-defined]
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Each (token, expert) pair is a token of its own, scaled before its one expert, of weight 1."""
            x_TH = hidden_states.reshape(-1, self.hidden_dim)
            _, logits_TE = self.router(x_TH)
            top_TK, ids_TK = logits_TE.topk(self.top_k, dim=1)
            scores_TK = top_TK.float().sigmoid().to(x_TH.dtype)
            x_PH = (x_TH[:, None] * scores_TK[..., None]).reshape(-1, self.hidden_dim)
            y_PH = self.experts(x_PH, ids_TK.reshape(-1, 1), x_PH.new_ones(len(x_PH), 1))
            out_TH = self.shared_expert(x_TH) + y_PH.view(*ids_TK.shape, -1).sum(1)
            return out_TH, logits_TE

    return {"Llama4TextExperts": Experts, "Llama4TextMoe": Block}


ADAPTER = Adapter(_classes)

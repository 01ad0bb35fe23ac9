"""Tiny random checkpoints of twelve families, written as the hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LATENT: dict[str, Any] = {  # DeepSeek's attention
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 48, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_key_value_heads": 4},
    "deepseek_v2": _LATENT | {"topk_method": "greedy", "num_hidden_layers": 4},
    "deepseek_v3": _LATENT | {"n_group": 2, "topk_group": 1, "num_hidden_layers": 4},
    "gpt_oss": {
        "num_local_experts": 8,
        "head_dim": 16,
        "sliding_window": 16,
        "num_hidden_layers": 4,
        "max_position_embeddings": 131072,  # what its rope scaling is for
    },
    "phimoe": {"num_local_experts": 8, "lm_head_bias": True, "attention_bias": True},
    "granitemoe": {"num_local_experts": 8, "tie_word_embeddings": True, "attention_multiplier": 0.25},
    "glm4_moe": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 48,
        "head_dim": 16,
        "use_qk_norm": True,
    },
    "minimax_m2": {"num_local_experts": 8, "head_dim": 16},
    "jamba": {
        "num_experts": 8,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    return transformers.AutoConfig.for_model(family, **(_COMMON | FAMILIES[family] | overrides))


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model whose routing matters and whose logits are of order 1."""
    config = tiny_config(family, **overrides)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    _randomize(model, seed)
    model.eval()
    return model


def tiny_checkpoint(
    family: str,
    directory: Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    fused: bool = False,
    max_shard_size: str | int = "5GB",
    **overrides: Any,
) -> Path:
    """Write a random checkpoint without a tokenizer: per-expert tensors as on the hub, or ``fused`` ones.

    8 experts, 2 a token. ``overrides`` are entries of the config. Returns ``directory``.
    """
    model = tiny_model(family, dtype, seed, **overrides)
    model.save_pretrained(directory, save_original_format=not fused, max_shard_size=max_shard_size)
    return directory


@torch.no_grad()
def _randomize(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    saved = set(model.state_dict())
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("A_log", ".D", "dt_proj.bias", "dt_bias")):  # a state-space model stays stable
            parameter.add_(0.1 * noise)
        elif "norm" in name and name.endswith("weight"):  # around 1, or 0 where the module adds 1
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(noise * (0.2 if _is_router(name) else 0.12))
    for name, buffer in model.named_buffers():
        if name in saved and name.endswith("bias"):  # added to a router's scores
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def _is_router(name: str) -> bool:
    return ".gate." in name or ".router." in name

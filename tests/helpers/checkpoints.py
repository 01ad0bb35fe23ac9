"""Tiny random checkpoints of any family, written as the hub has them. Twelve families have configs of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers.tiny_configs import small_config
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

MAX_PARAMETERS = 20_000_000

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
    """``family``: a model type; ``overrides`` are entries of the config."""
    if family not in FAMILIES:
        return small_config(family, **overrides)
    return transformers.AutoConfig.for_model(family, **(_COMMON | FAMILIES[family] | overrides))


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Transformers' class for a whole checkpoint, other inputs than text included."""
    mapping = next(m for m in (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING) if type(config) in m)
    return _get_model_class(config, mapping)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model whose routing matters and whose logits are of order 1."""
    config = tiny_config(family, **overrides)
    model_class = stock_class(config)
    with torch.device("meta"):  # a field that was not made small must not fill the memory
        num_parameters = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
    assert num_parameters < MAX_PARAMETERS, f"{family} is not tiny: {num_parameters:,} parameters"
    model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
    _randomize(model, seed, 0.12 if family in FAMILIES else 0.08)
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
def _randomize(model: nn.Module, seed: int, scale: float) -> None:
    """Weights small enough that float32 rounding of some families' recurrences and selections is not amplified."""
    generator = torch.Generator().manual_seed(seed)
    saved = set(model.state_dict())
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("A_log", ".D", "dt_proj.bias", "dt_bias")) or (
            "norm" in name and name.endswith("weight")
        ):  # a state-space model stays stable
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(noise * (0.2 if _is_router(name) else scale))
    for name, buffer in model.named_buffers():
        if name in saved and name.endswith("bias"):  # added to a router's scores
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def _is_router(name: str) -> bool:
    return ".gate." in name or ".router." in name

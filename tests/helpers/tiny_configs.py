"""Tiny configs of any Mixture-of-Experts family: its own defaults, made small by the names of their fields.

A family that needs more than that has an entry in ``OVERRIDES``.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig

#: Field of a config -> its value, in every family that has the field.
SMALL: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Experts: 8, of which 2 for a token
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "num_expert_group": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 3,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # Widths
    "intermediate_size": 96,
    "dense_intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
    "shared_experts_intermediate_size": 80,
    "moe_shared_expert_intermediate_size": 80,
    "shared_intermediate_size": 80,
    # Attention: windows and selections shorter than the tests' prompts
    "sliding_window": 8,
    "sliding_window_size": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 32,
    "index_n_heads": 16,  # scores are sums of ReLUs: with few heads many are exactly 0, and their order is chance
    "index_topk": 8,
    "swa_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    # Linear attention and state spaces
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_dt_rank": 8,
    "ssm_state_size": 8,
}

_LATENT = {"num_key_value_heads": 4}  # as many keys as queries, from one latent vector

_HYBRID = ["linear_attention", "full_attention"] * 2

#: Model type -> what its defaults and ``SMALL`` do not give.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _HYBRID},
    "cohere2_moe": {"logit_scale": 1.0},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "per_layer_config": {},
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 200,
        "hidden_size_per_layer_input": 16,
        "per_layer_config": {"03": {"head_dim": 32}},
    },
    "granitemoehybrid": {
        "layer_types": _HYBRID,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "position_embedding_type": "rope",
    },
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 16,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}


def small_values(model_type: str) -> dict[str, Any]:
    """Fields of a tiny config of a text model."""
    defaults = transformers.CONFIG_MAPPING[model_type]().to_dict()
    values = {name: value for name, value in SMALL.items() if name in defaults}
    if "kv_lora_rank" in defaults:
        values |= _LATENT
    return values | OVERRIDES.get(model_type, {})


def small_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    return transformers.AutoConfig.for_model(model_type, **(small_values(model_type) | overrides))

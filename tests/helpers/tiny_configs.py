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

#: The same for parts that read or write something else than text.
SMALL_PART: dict[str, Any] = {
    "num_hidden_layers": 1,
    "num_layers": 1,
    "depth": 1,
    "encoder_layers": 1,
    "hidden_size": 64,
    "d_model": 64,
    "out_hidden_size": 64,
    "output_dim": 64,
    "intermediate_size": 64,
    "encoder_ffn_dim": 64,
    "num_attention_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
}

_LATENT = {"num_key_value_heads": 4}  # as many keys as queries, from one latent vector

_ROPE = {"rope_type": "default", "rope_theta": 1e4}

_HYBRID = ["linear_attention", "full_attention"] * 2

#: Model type -> what its defaults and ``SMALL`` do not give.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _HYBRID},
    "cohere2_moe": {"logit_scale": 1.0},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", *["sparse"] * 3]},
    "deepseek_v4": {"o_lora_rank": 32, "o_groups": 2},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "head_dim": 32,
        "per_layer_config": {},
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense"],
        "per_layer_config": {},
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
    },
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [48, 32],
        "rope_parameters": _ROPE | {"mrope_section": [2, 2, 4]},
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 200,
        "hidden_size_per_layer_input": 16,
        "per_layer_config": {"03": {"head_dim": 32}},
    },
    "glm4v_moe_text": {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "glm5_next_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "index_kpool": 4,
        "qk_rope_head_dim": 0,
        "head_dim": 0,
    },
    "granitemoe": {"attention_multiplier": 0.25},
    "granitemoe_swa": {"attention_multiplier": 0.25},
    "granitemoeshared": {"attention_multiplier": 0.25},
    "granitemoehybrid": {
        "attention_multiplier": 0.25,
        "layer_types": _HYBRID,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "position_embedding_type": "rope",
    },
    "inkling2_vision": {"text_hidden_size": 64},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "inkling_vision": {"text_hidden_size": 64, "patch_size": 8, "num_hidden_layers": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"intermediate_size_mlp": 96, "attention_chunk_size": 16, "interleave_moe_layer_step": 2},
    "longcat_flash": {"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 48, "zero_expert_num": 4},
    "mistral4": {
        "head_dim": 32,
        "rope_parameters": _ROPE
        | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
        | {"llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5},
    },
    "mixtral": {"sliding_window": 8},
    "muse_spark": {"projector_hidden_size": 64},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [8, 16, 32, 64]},
    "muse_spark_text": {"moe_hidden_size": 48},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 199, "num_key_value_heads": 4},
    "nemotron3_diarization_audio": {"hidden_size": 512},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
    },
    "nemotron_h_omni": {"projector_hidden_size": 64},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 198},  # generate() asks for it
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 16,
    },
    "radio": {"video_temporal_patch_size": 2},
    "step3p5": {"sliding_window": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}


def small_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A tiny config of any model type, multimodal ones included."""
    defaults = transformers.CONFIG_MAPPING[model_type]()
    return transformers.AutoConfig.for_model(model_type, **(_small_values(defaults) | overrides))


def _small_values(defaults: PreTrainedConfig) -> dict[str, Any]:
    names = defaults.to_dict()
    parts = {name: getattr(defaults, name, None) for name in defaults.sub_configs}
    values = {name: _small_values(part) for name, part in parts.items() if part is not None and part.model_type}
    table = SMALL if "vocab_size" in names else SMALL_PART
    unset = {"sliding_window"} if names.get("sliding_window") is None else set()  # no windows: some only have the field
    values |= {
        name: value for name, value in table.items() if name in names and name not in values and name not in unset
    }
    if "kv_lora_rank" in names:
        values |= _LATENT
    return values | OVERRIDES.get(defaults.model_type, {})

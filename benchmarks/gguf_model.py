"""What llama.cpp calls the parts of a Mixtral or Qwen3-MoE: metadata from config.json, and names of tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from gguf_file import Value

ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}

TensorClass = Literal["experts", "attention", "head", "embedding", "norms, routers"]

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERTS = {
    "w1": "ffn_gate_exps",
    "w2": "ffn_down_exps",
    "w3": "ffn_up_exps",
    "gate_proj": "ffn_gate_exps",
    "down_proj": "ffn_down_exps",
    "up_proj": "ffn_up_exps",
}


def metadata_of(config: Mapping[str, Any]) -> dict[str, Value]:
    """From what config.json holds. The model gets no vocabulary, only its size: tokens are ids."""
    arch = ARCHITECTURES[config["model_type"]]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    values: dict[str, Value] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": head_dim,
        "expert_count": config.get("num_local_experts") or config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "vocab_size": config["vocab_size"],
    }
    if "moe_intermediate_size" in config:
        values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    head: dict[str, Value] = {"general.architecture": arch, "general.quantization_version": 2}
    return head | {f"{arch}.{name}": value for name, value in values.items()} | {"tokenizer.ggml.model": "no_vocab"}


def group_tensors(names: Iterable[str]) -> dict[str, list[str]]:
    """GGUF name -> the checkpoint's tensors that make it: one, or those of all experts of a layer in their order."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        target, expert = _rename(name)
        groups.setdefault(target, []).append((expert, name))
    return {target: [name for _, name in sorted(parts)] for target, parts in groups.items()}


def class_of(name: str) -> TensorClass:
    """The class that a GGUF tensor is counted in."""
    if "_exps." in name:
        return "experts"
    if re.search(r"\.attn_(q|k|v|output)\.", name):
        return "attention"
    return {"output.weight": "head", "token_embd.weight": "embedding"}.get(name, "norms, routers")  # type: ignore[return-value]


def _rename(name: str) -> tuple[str, int]:
    """The GGUF name, and the expert (0 for what is none's)."""
    if name in _OUTER:
        return _OUTER[name], 0
    match = re.fullmatch(r"model\.layers\.(\d+)\.(?:(.+)\.experts\.(\d+)\.(\w+)|(.+))\.weight", name)
    assert match, f"a tensor without a place in a GGUF file: {name}"
    layer, block, expert, matrix, inner = match.groups()
    part = _EXPERTS[matrix] if block else _INNER[inner]
    return f"blk.{layer}.{part}.weight", int(expert or 0)

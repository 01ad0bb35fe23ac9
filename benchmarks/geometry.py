"""Sizes of the models that benchmarks make up, and what config.json and safetensors on the hub call their parts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Family = Literal["mixtral", "qwen3_moe"]

WEIGHT_STD = 0.02
EMBEDDING_STD = 1.0
CONTEXT_LENGTH = 4096
ROPE_THETA = 1000000.0

#: The module that holds a layer's router and experts, and an expert's gate, down and up matrix.
_EXPERT_NAMES: dict[Family, tuple[str, tuple[str, str, str]]] = {
    "mixtral": ("block_sparse_moe", ("w1", "w2", "w3")),
    "qwen3_moe": ("mlp", ("gate_proj", "down_proj", "up_proj")),
}


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model."""

    hidden: int
    intermediate: int  # of one expert
    experts: int
    layers: int
    vocab: int
    head_dim: int = 128
    queries_per_kv: int = 4
    query_factor: int = 1  # width of all query heads together / hidden
    active: int = 2  # experts a token
    family: Family = "mixtral"

    @property
    def heads(self) -> int:
        return max(1, self.query_factor * self.hidden // self.head_dim)

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // self.queries_per_kv)

    @property
    def has_query_norms(self) -> bool:
        return self.family == "qwen3_moe"

    @property
    def rms_eps(self) -> float:
        return 1e-6 if self.family == "qwen3_moe" else 1e-5

    @property
    def expert_parameters(self) -> int:
        return 3 * self.hidden * self.intermediate

    @property
    def num_parameters(self) -> int:
        return sum(tensor.count for tensor in tensors_of(self))

    def tokens_per_expert(self, num_tokens: int) -> float:
        """Tokens T times experts a token K, over experts E: what an expert gets of a batch if routing is even."""
        return num_tokens * self.active / self.experts


PRESETS = {
    "4gib": Geometry(4096, 14336, experts=5, layers=2, vocab=32000),
    "1gib": Geometry(2048, 7168, experts=5, layers=2, vocab=32000),
    "mixtral-layer": Geometry(4096, 14336, experts=8, layers=1, vocab=1024),  # a small head: the layer is what counts
    "mixtral-8x7b": Geometry(4096, 14336, experts=8, layers=32, vocab=32000),
    "qwen3-30b-a3b": Geometry(
        2048, 768, experts=128, layers=48, vocab=151936, queries_per_kv=8, query_factor=2, active=8, family="qwen3_moe"
    ),
    "tiny": Geometry(256, 448, experts=8, layers=6, vocab=4096, head_dim=32, queries_per_kv=2),  # the demo model's
    "tiny-qwen": Geometry(
        128, 64, experts=16, layers=4, vocab=512, head_dim=32, query_factor=2, active=4, family="qwen3_moe"
    ),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return 2 * self.count

    @property
    def is_norm(self) -> bool:
        return self.name.endswith("norm.weight")


def std_of(name: str) -> float:
    """Spread of a tensor's weights, by its name on the hub or in GGUF.

    Embeddings are as large as what a layer adds. With small ones attention, which averages over all tokens, makes the
    tokens of a prompt alike, and then they all route to the same experts.
    """
    return EMBEDDING_STD if "emb" in name else WEIGHT_STD


def tensors_of(geometry: Geometry) -> Iterator[Tensor]:
    """Every tensor, under its name on the hub, in the order of the file."""
    yield Tensor("model.embed_tokens.weight", (geometry.vocab, geometry.hidden))
    for layer in range(geometry.layers):
        yield from _attention_of(geometry, f"model.layers.{layer}")
        yield from _experts_of(geometry, f"model.layers.{layer}")
    yield Tensor("model.norm.weight", (geometry.hidden,))
    yield Tensor("lm_head.weight", (geometry.vocab, geometry.hidden))


def _attention_of(geometry: Geometry, prefix: str) -> Iterator[Tensor]:
    hidden, queries = geometry.hidden, geometry.heads * geometry.head_dim
    kv = geometry.kv_heads * geometry.head_dim
    for name, shape in (
        ("q", (queries, hidden)),
        ("k", (kv, hidden)),
        ("v", (kv, hidden)),
        ("o", (hidden, queries)),
    ):
        yield Tensor(f"{prefix}.self_attn.{name}_proj.weight", shape)
    if geometry.has_query_norms:
        yield Tensor(f"{prefix}.self_attn.q_norm.weight", (geometry.head_dim,))
        yield Tensor(f"{prefix}.self_attn.k_norm.weight", (geometry.head_dim,))
    yield Tensor(f"{prefix}.input_layernorm.weight", (hidden,))
    yield Tensor(f"{prefix}.post_attention_layernorm.weight", (hidden,))


def _experts_of(geometry: Geometry, prefix: str) -> Iterator[Tensor]:
    block, (gate, down, up) = _EXPERT_NAMES[geometry.family]
    yield Tensor(f"{prefix}.{block}.gate.weight", (geometry.experts, geometry.hidden))
    for expert in range(geometry.experts):
        path = f"{prefix}.{block}.experts.{expert}"
        yield Tensor(f"{path}.{gate}.weight", (geometry.intermediate, geometry.hidden))
        yield Tensor(f"{path}.{down}.weight", (geometry.hidden, geometry.intermediate))
        yield Tensor(f"{path}.{up}.weight", (geometry.intermediate, geometry.hidden))


def config_of(geometry: Geometry) -> dict[str, Any]:
    """What config.json holds. No token ends a text: a benchmark generates as many tokens as it asks for."""
    return _family_config(geometry) | {
        "model_type": geometry.family,
        "hidden_size": geometry.hidden,
        "num_experts_per_tok": geometry.active,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "vocab_size": geometry.vocab,
        "max_position_embeddings": CONTEXT_LENGTH,
        "rms_norm_eps": geometry.rms_eps,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "bfloat16",
    }


def _family_config(geometry: Geometry) -> dict[str, Any]:
    if geometry.family == "mixtral":
        return {
            "architectures": ["MixtralForCausalLM"],
            "intermediate_size": geometry.intermediate,
            "num_local_experts": geometry.experts,
        }
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": 8 * geometry.intermediate,  # of dense layers, of which there are none
        "moe_intermediate_size": geometry.intermediate,
        "num_experts": geometry.experts,
        "norm_topk_prob": True,
    }


def add_geometry(parser: argparse.ArgumentParser, default: str) -> None:
    """The flags that choose a geometry: a preset, and sizes that override it."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default=default, help=f"sizes to start from ({default})")
    for name in ("hidden", "intermediate", "experts", "layers", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")


def geometry_of(arguments: argparse.Namespace) -> Geometry:
    sizes = asdict(PRESETS[arguments.preset])
    return Geometry(**{name: getattr(arguments, name, None) or value for name, value in sizes.items()})

"""Every family that can be run, found in the installed transformers, and how each is tested.

What is written down here is only what cannot be found: the sample of the default test suite, and the exceptions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import ModuleType

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from moray.runtime.model.adapters import adapter_of, family_of
from moray.runtime.model.architectures import experts_classes, find_architecture, modeling_modules
from moray.runtime.model.attention_modules import uses_usual_names as is_usual_attention
from moray.runtime.model.expert_gates import fused_gate
from moray.runtime.model.families import supported_families
from moray.runtime.model.router_modules import uses_usual_names as is_usual_router

#: Model types that the default test suite compares with transformers (tests/golden); all others are in the sweep.
SAMPLE: tuple[str, ...] = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe", "granitemoe"),
    *("glm4_moe", "minimax_m2", "jamba"),
    # linear attention, state spaces, convolutions, a cache of its own
    *("qwen3_next", "nemotron_h", "lfm2_moe", "minimax"),
    # compressed and indexed attention, attention of several kinds, per-layer heads, one expert a token
    *("deepseek_v4", "gemma4_text", "zaya"),
    # adapters, multimodal
    *("llama4", "dbrx", "longcat_flash", "step3p7", "qwen3_vl_moe"),
)

#: Model type -> why it is not run. A test fails when one of them starts to work, or is unknown.
EXCEPTIONS: dict[str, str] = {
    "diffusion_gemma": "denoises blocks of tokens, has no next token to sample",
    "doge": "experts are single rows of two embeddings, too small to be loaded one by one",
    "jetmoe": "attention heads are experts, too; outside transformers' experts interface",
    "nllb-moe": "encoder and decoder",
    "openai_privacy_filter": "labels tokens, generates none",
    "switch_transformers": "encoder and decoder",
}

_SOME_SIZE = 16


@dataclass(frozen=True, slots=True)
class FamilyEntry:
    """One model type. ``route``: "interface", "adapter", or "" if it cannot be run.

    ``kernels``: what may run fused: "experts" if the gate was recognized by trying it, "attention" and "router" if
    their forwards use the usual names only (both are tried when a model is loaded). The rest runs in torch.
    ``text_only``: parts for other inputs than text are left out at conversion.
    """

    model_type: str
    architecture: str
    route: str
    kernels: tuple[str, ...]
    text_only: bool
    tested: str


def list_families() -> list[FamilyEntry]:
    """All model types with experts that transformers has, sorted. Imports their modules: takes seconds."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # default configs warn about their own token ids
    try:
        found = [entry for model_type in transformers.CONFIG_MAPPING if (entry := _entry(model_type)) is not None]
    finally:
        transformers.logging.set_verbosity(verbosity)
    listed = {entry.model_type for entry in found}
    found += [
        FamilyEntry(model_type, "", "", (), False, f"exception: {reason}")
        for model_type, reason in EXCEPTIONS.items()
        if model_type not in listed and model_type in transformers.CONFIG_MAPPING
    ]
    return sorted(found, key=lambda entry: entry.model_type)


def _entry(model_type: str) -> FamilyEntry | None:
    """None for a model type that has no experts of a supported family, or no language model of its own."""
    try:
        config = transformers.CONFIG_MAPPING[model_type]()
        text_config = config.get_text_config()
    except Exception:  # a config without defaults, or one of several texts: no family that can be run
        return None
    if not {family_of(type(part).__module__) for part in (config, text_config)} & set(supported_families()):
        return None
    architecture = find_architecture(config)
    classes = experts_classes(config)
    if architecture is None or not classes:
        return None
    modules = modeling_modules(config)
    is_adapted = not any(value.__module__.startswith("transformers.") for value in classes)
    return FamilyEntry(
        model_type,
        architecture[0].__name__,
        "adapter" if is_adapted or any(adapter_of(family_of(m.__name__)) for m in modules) else "interface",
        _kernels(modules, classes, text_config),
        config is not text_config,
        _tested(model_type),
    )


def _tested(model_type: str) -> str:
    if model_type in EXCEPTIONS:
        return f"exception: {EXCEPTIONS[model_type]}"
    return "default suite" if model_type in SAMPLE else "sweep"


def _kernels(modules: list[ModuleType], experts: list[type[nn.Module]], config: PreTrainedConfig) -> tuple[str, ...]:
    own = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    ]
    found = {
        "experts": any(_has_fused_gate(value, config) for value in experts),
        "attention": any(v.__name__.endswith("Attention") and is_usual_attention(v) for v in own),
        "router": any(v.__name__.lower().endswith("topkrouter") and is_usual_router(v) for v in own),
    }
    return tuple(name for name, is_found in found.items() if is_found)


def _has_fused_gate(experts_class: type[nn.Module], config: PreTrainedConfig) -> bool:
    parts = (getattr(config, name, None) for name in config.sub_configs)
    for candidate in (config, *(part for part in parts if part is not None)):
        complete = copy.deepcopy(candidate)
        for name, value in vars(candidate).items():
            if value is None and ("expert" in name or "intermediate" in name):  # unset unless there are experts
                setattr(complete, name, _SOME_SIZE)
        try:
            with torch.device("meta"):
                module = experts_class(complete)
        except Exception:  # experts that are made of another config, or of more than one
            continue
        return fused_gate(module) is not None
    return False

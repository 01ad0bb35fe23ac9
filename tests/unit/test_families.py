from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.checkpoints import FAMILIES, tiny_config
from torch import nn

from moray.runtime.errors import CheckpointError
from moray.runtime.model.adapters import adapted_families
from moray.runtime.model.components import classify
from moray.runtime.model.families import (
    build_model,
    expert_modules,
    expert_params,
    is_experts,
    load_config,
    supported_families,
)


def test_families_are_found_in_the_installed_transformers() -> None:
    families = supported_families()
    assert len(families) > 50 and set(FAMILIES) <= set(families)
    assert set(adapted_families()) <= set(families)
    assert not {"llama", "doge", "jetmoe"} & set(families)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_described_and_not_allocated(family: str) -> None:
    config = tiny_config(family)
    stock = transformers.AutoModelForCausalLM.from_config(config)
    model = build_model(config, torch.bfloat16)
    experts = expert_modules(model)
    assert [name for name, _ in experts] == [name for name, _ in expert_modules(stock)]
    for (_, ours), (_, theirs) in zip(experts, expert_modules(stock), strict=True):
        assert not ours._parameters and type(ours) is type(theirs)
        shapes = {name: (tuple(p.shape), torch.bfloat16) for name, p in theirs.named_parameters()}
        assert expert_params(ours) == shapes
    expected = {name for name in stock.state_dict() if ".experts." not in name}
    assert set(model.state_dict()) == expected


def test_buffers_that_are_not_saved_are_computed() -> None:
    config = tiny_config("mixtral")
    stock = transformers.AutoModelForCausalLM.from_config(config)
    model = build_model(config, torch.bfloat16)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq, rtol=0, atol=0)


def test_a_meta_model_allocates_nothing() -> None:
    model = build_model(tiny_config("gpt_oss"), torch.bfloat16, "meta")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_given_config_is_left_alone() -> None:
    config = tiny_config("mixtral")
    before = config.to_dict()
    build_model(config, torch.float16, "meta")
    assert config.to_dict() == before


def test_classes_are_whole_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral import modeling_mixtral as mixtral

    original = mixtral.MixtralExperts.__init__

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no attention today")

    with monkeypatch.context() as patch:
        patch.setattr(mixtral.MixtralAttention, "__init__", fail)
        with pytest.raises(CheckpointError, match="no attention today"):
            build_model(tiny_config("mixtral"), torch.bfloat16, "meta")
    assert mixtral.MixtralExperts.__init__ is original
    assert (
        transformers.AutoModelForCausalLM.from_config(tiny_config("mixtral"))
        .model.layers[0]
        .mlp.experts.gate_up_proj.std()
        > 0
    )


def test_an_adapter_leaves_the_familys_classes_alone() -> None:
    from transformers.models.dbrx import modeling_dbrx as dbrx

    originals = dbrx.DbrxFFN, dbrx.DbrxExperts
    model = build_model(tiny_config("dbrx"), torch.float32, "meta")
    assert (dbrx.DbrxFFN, dbrx.DbrxExperts) == originals
    assert {type(module).__module__ for _, module in expert_modules(model)} == {"moray.runtime.model.adapters.dbrx"}
    stock = transformers.AutoModelForCausalLM.from_config(tiny_config("dbrx"))
    assert not expert_modules(stock)


def test_a_config_is_read_from_a_checkpoint(checkpoint: Callable[[str], Path]) -> None:
    assert load_config(checkpoint("jamba")).model_type == "jamba"


def test_only_experts_are_experts() -> None:
    model = build_model(tiny_config("deepseek_v3"), torch.bfloat16, "meta")
    assert [name for name, _ in expert_modules(model)] == [f"model.layers.{i}.mlp.experts" for i in (1, 2, 3)]
    assert not is_experts(nn.Linear(2, 2))


def components(family: str, **overrides: Any) -> dict[str, str]:
    found = classify(build_model(tiny_config(family, **overrides), torch.bfloat16, "meta"))
    return {path.replace("model.layers.", ""): component for path, component in found.items()}


def test_components_of_a_plain_model() -> None:
    found = components("mixtral")
    assert found["model.embed_tokens"] == found["lm_head"] == "embeddings"
    attention = [f"{i}.self_attn.{name}" for i in range(3) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert [path for path, component in found.items() if component == "attention"] == attention
    assert len(found) == 14


def test_a_tied_head_is_the_embedding() -> None:
    found = components("granitemoe")
    assert "lm_head" not in found and found["model.embed_tokens"] == "embeddings"


def test_shared_experts_and_dense_layers() -> None:
    found = components("deepseek_v3")
    assert found["0.mlp.gate_proj"] == "dense" and found["1.mlp.shared_experts.gate_proj"] == "shared"
    assert found["2.self_attn.kv_b_proj"] == "attention"
    found = components("qwen2_moe")
    assert found["0.mlp.shared_expert.up_proj"] == "shared" and "0.mlp.shared_expert_gate" not in found


def test_state_space_mixers_and_routers_stay_as_they_are() -> None:
    found = components("jamba")
    assert not any("mamba" in path or "router" in path for path in found)
    assert found["1.self_attn.q_proj"] == "attention" and found["0.feed_forward.up_proj"] == "dense"
    assert not any("router" in path for path in components("gpt_oss"))

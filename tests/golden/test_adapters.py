"""LoRA adapters merged at conversion: the weights and logits of PEFT's own merged model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.reference import runner, stock_logits, stock_model
from helpers.stores import state_of_store
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from moray.runtime.convert.converter import convert
from moray.runtime.errors import CheckpointError, StoreError
from moray.runtime.store.manifest import Manifest
from moray.runtime.store.store import Store

PROMPT = [3, 17, 42, 99, 7, 150, 23, 64, 5, 88, 120, 31]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's advice on settings that are meant here


def train(checkpoint: Path, directory: Path, seed: int = 0, **settings: Any) -> Path:
    """Save an adapter of random numbers, as PEFT does after training."""
    model = get_peft_model(stock_model(checkpoint), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.1 * noise if "lora_" in name else parameter + 0.05 * noise)
    model.save_pretrained(directory)
    return directory


def merged(checkpoint: Path, *adapters: Path) -> PreTrainedModel:
    model = stock_model(checkpoint)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval()


def assert_equal(store: Path, model: PreTrainedModel, base: PreTrainedModel) -> None:
    """The store's weights and logits are the model's, and not those of the model without its adapter."""
    expected, before = model.state_dict(), base.state_dict()
    with Store.open(store) as opened:
        state = state_of_store(opened, model)
    assert set(expected) == set(state)
    changed = 0
    for name, tensor in state.items():
        unchanged = torch.equal(expected[name], before[name])
        changed += not unchanged
        tolerance = 0 if unchanged else 2e-7
        assert (tensor - expected[name]).abs().max() <= tolerance * max(1, expected[name].abs().max()), name
    assert changed
    wanted = stock_logits(model, PROMPT)
    assert (wanted - stock_logits(base, PROMPT)).abs().max() > 0.05
    with runner(store, "float") as made:
        assert (made.logits(PROMPT) - wanted).abs().max() < 1e-5


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("mixtral", {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION}),
    "patterns": (
        "mixtral",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ATTENTION,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"layers\.[02]\.self_attn\.v_proj": 7},
            "alpha_pattern": {"k_proj": 11, "layers.1.self_attn.q_proj": 3},
        },
    ),
    "rslora": ("qwen3_moe", {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ATTENTION}),
    "embeddings-and-head": (
        "mixtral",
        {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "fan-in-fan-out": ("mixtral", {"r": 3, "target_modules": ["q_proj", "embed_tokens"], "fan_in_fan_out": True}),
    "biases": ("qwen2_moe", {"r": 3, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "lora-bias": ("qwen2_moe", {"r": 3, "target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "all-biases": ("phimoe", {"r": 3, "target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "modules-to-save": (
        "qwen3_moe",
        {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "gate", "input_layernorm"]},
    ),
    "shared-experts": ("qwen2_moe", {"r": 3, "target_modules": r".*\.shared_expert\.(gate|up|down)_proj"}),
    "latent-attention": ("deepseek_v3", {"r": 3, "target_modules": "all-linear"}),
    "stacked-experts": ("mixtral", {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": EXPERTS}),
    "stacked-experts-and-router": (
        "qwen3_moe",
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["q_proj"],
            "target_parameters": [*EXPERTS, "mlp.gate.weight"],
            "rank_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 2},
        },
    ),
    "stacked-down-only": ("mixtral", {"r": 3, "target_modules": [], "target_parameters": EXPERTS[1:]}),
    "transposed-experts": (
        "gpt_oss",
        {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION, "target_parameters": [f"1.{name}" for name in EXPERTS]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_and_logits_equal_peft(case: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    family, settings = CASES[case]
    base = checkpoint(family)
    adapter = train(base, tmp_path / "adapter", **settings)
    manifest = convert(base, tmp_path / "store", "none", lora=[adapter])
    assert_equal(tmp_path / "store", merged(base, adapter), stock_model(base))
    assert adapter.name in manifest.source["adapter"]


# ------------------------------------------------------------------- layouts of older transformers


def write_adapter(directory: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]} | settings
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, directory / "adapter_model.safetensors"
    )
    return directory


def factors(module: str, rows: int, columns: int, rank: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": 0.1 * torch.randn(rank, columns, generator=generator),
        f"{module}.lora_B.weight": 0.1 * torch.randn(rows, rank, generator=generator),
    }


def per_expert_adapter(directory: Path, block: str, names: dict[str, tuple[int, int]]) -> Path:
    """As PEFT wrote it where every expert was modules of its own."""
    tensors = {}
    for layer in range(3):
        for expert in range(8):
            for number, (name, (rows, columns)) in enumerate(names.items()):
                module = f"model.layers.{layer}.{block}.experts.{expert}.{name}"
                tensors |= factors(module, rows, columns, seed=100 * layer + 10 * expert + number)
    return write_adapter(directory, tensors, target_modules=list(names))


LAYOUTS = {
    "mixtral": ("block_sparse_moe", {"w1": (96, 64), "w2": (64, 96), "w3": (96, 64)}),
    "qwen3_moe": ("mlp", {"gate_proj": (48, 64), "up_proj": (48, 64), "down_proj": (64, 48)}),
}


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_an_adapter_of_single_experts(family: str, fused: bool, tmp_path: Path) -> None:
    """Whatever layout the checkpoint itself has."""
    base = tiny_checkpoint(family, tmp_path / "base", fused=fused)
    adapter = per_expert_adapter(tmp_path / "adapter", *LAYOUTS[family])
    convert(base, tmp_path / "store", "none", lora=[adapter])
    assert_equal(tmp_path / "store", merged(base, adapter), stock_model(base))


def test_an_adapter_of_one_matrix_of_one_expert(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT refuses this with newer transformers; here every tensor counts for itself."""
    base, module = checkpoint("mixtral"), "model.layers.1.block_sparse_moe.experts.5.w3"
    tensors = factors(module, 96, 64)
    adapter = write_adapter(tmp_path / "adapter", tensors, alpha_pattern={"layers.1.*w3": 9})
    convert(base, tmp_path / "store", "none", lora=[adapter])
    expected = load_file(base / "model.safetensors")
    expected[f"{module}.weight"] += 3 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    model = stock_model(base)
    with Store.open(tmp_path / "store") as opened:
        state = state_of_store(opened, model)
    for name, tensor in state.items():
        wanted = model.state_dict()[name].clone()
        if name == "model.layers.1.mlp.experts.gate_up_proj":
            assert not torch.equal(tensor, wanted)
            wanted[5, 96:] = expected[f"{module}.weight"]
        assert (tensor - wanted).abs().max() < 2e-7, name


# ------------------------------------------------------------------------------------- conversions


def test_adapters_are_merged_in_order(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = checkpoint("mixtral")
    one = train(base, tmp_path / "one", r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    two = train(base, tmp_path / "two", seed=1, r=4, target_modules=["q_proj", "lm_head"])
    manifest = convert(base, tmp_path / "store", "none", lora=[one, two])
    assert_equal(tmp_path / "store", merged(base, one, two), stock_model(base))
    assert "one" in manifest.source["adapter"] and "two" in manifest.source["adapter 2"]


def test_merging_precedes_quantization_and_does_not_depend_on_workers(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("mixtral")
    adapter = train(base, tmp_path / "adapter", r=3, target_modules=["q_proj"], target_parameters=EXPERTS)
    merged(base, adapter).save_pretrained(tmp_path / "merged")

    def weights(manifest: Manifest) -> list[int]:
        return [entry.checksum for entry in manifest.shards.values()]

    expected = weights(convert(tmp_path / "merged", tmp_path / "expected", "hqq4"))
    alone = convert(base, tmp_path / "alone", "hqq4", lora=[adapter], workers=1)
    together = convert(base, tmp_path / "together", "hqq4", lora=[adapter], workers=2)
    assert weights(alone) == weights(together)
    same = sum(one == other for one, other in zip(weights(alone), expected, strict=True))
    assert same >= 0.5 * len(expected)  # else a code at a tie, after sums in another order
    assert not set(weights(alone)) & set(weights(convert(base, tmp_path / "base", "hqq4")))


def test_16_bit_weights_are_rounded_once(tmp_path: Path) -> None:
    base = tiny_checkpoint("mixtral", tmp_path / "base", torch.bfloat16)
    adapter = train(base, tmp_path / "adapter", r=3, target_modules=["q_proj"])
    convert(base, tmp_path / "store", "none", lora=[adapter])
    expected = merged(base, adapter).state_dict()
    with Store.open(tmp_path / "store") as opened:
        state = state_of_store(opened, stock_model(base))
    for name, tensor in state.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].bfloat16()), name


def test_another_adapter_does_not_continue_an_unfinished_store(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint("mixtral")
    one = train(base, tmp_path / "one", r=3, target_modules=["q_proj"])
    two = train(base, tmp_path / "two", seed=1, r=3, target_modules=["q_proj"])
    with monkeypatch.context() as patched:
        patched.setattr("moray.runtime.convert.converter._finish_files", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(base, tmp_path / "store", lora=[one])
    with pytest.raises(StoreError, match="another checkpoint or recipe"):
        convert(base, tmp_path / "store", lora=[two])
    convert(base, tmp_path / "store", lora=[one])


# ---------------------------------------------------------------------------------------- refusals

Q_PROJ = "model.layers.1.self_attn.q_proj"


def refused(base: Path, adapter: Path, *fragments: str) -> None:
    store = adapter.parent / "store"
    with pytest.raises(CheckpointError) as caught:
        convert(base, store, lora=[adapter])
    assert not store.exists() and "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"r": 0}, "wrong value of r"),
        ({"r": "many"}, "wrong value of r"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"r": 5}, "rank 5"),
    ],
)
def test_settings_that_are_not_merged(
    settings: dict[str, Any], fragment: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(Q_PROJ, 64, 64), **settings)
    refused(checkpoint("mixtral"), adapter, fragment)


@pytest.mark.parametrize(
    ("tensors", "fragments"),
    [
        (factors("model.layers.1.self_attn.wq", 64, 64), ["2 tensors", "layers.1.self_attn.wq.lora_A.weight"]),
        (factors("model.layers.7.self_attn.q_proj", 64, 64), ["layers.7"]),
        (factors("model.layers.1.block_sparse_moe.experts.8.w1", 96, 64), ["experts.8.w1"]),
        (factors(Q_PROJ, 64, 32), ["[64, 32]", "[64, 64]"]),
        (factors(Q_PROJ, 64, 64) | {f"{Q_PROJ}.lora_magnitude_vector": torch.ones(64)}, ["lora_magnitude_vector"]),
        ({f"{Q_PROJ}.lora_A.weight": torch.ones(3, 64)}, ["alone", "lora_A"]),
        ({f"{Q_PROJ}.bias": torch.ones(64)}, [f"{Q_PROJ}.bias"]),
        ({"model.layers.1.block_sparse_moe.experts.0.w1.weight": torch.ones(96, 64)}, ["only a part"]),
        ({}, ["no tensors"]),
    ],
)
def test_tensors_that_match_nothing(
    tensors: dict[str, torch.Tensor], fragments: list[str], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    refused(checkpoint("mixtral"), write_adapter(tmp_path / "adapter", tensors), *fragments)


def test_tied_embeddings_are_not_changed_apart(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors("lm_head", 200, 64))
    refused(checkpoint("granitemoe"), adapter, "ties to")


def test_no_adapter(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    refused(checkpoint("mixtral"), tmp_path / "nothing", "adapter_config.json")
    adapter = write_adapter(tmp_path / "adapter", factors(Q_PROJ, 64, 64))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(checkpoint("mixtral"), adapter, "adapter_model.bin")


def test_numbers_that_are_none(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = factors(Q_PROJ, 64, 64)
    tensors[f"{Q_PROJ}.lora_A.weight"][1, 1] = torch.nan
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.weight holds NaN"):
        convert(checkpoint("mixtral"), tmp_path / "store", lora=[adapter])
    assert not (tmp_path / "store" / "manifest.msgpack").exists()

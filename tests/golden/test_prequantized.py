"""Pre-quantized checkpoints: kept codes stand for exactly the weights that their formats define."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.prequantized import (
    Pair,
    awq,
    fp8,
    gptq,
    int8,
    int8_with_zeros,
    mxfp4,
    mxfp4_in_int8,
    packed,
    write_mxfp4_pair,
    write_pair,
)
from helpers.reference import greedy, runner, stock_greedy, stock_logits, stock_model
from helpers.stores import state_of_store
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from moray.runtime.convert.converter import convert
from moray.runtime.errors import CheckpointError
from moray.runtime.model.layer_modules import FusedBlock, FusedLayer
from moray.runtime.model.packed_modules import PackedLinear
from moray.runtime.store.manifest import Manifest
from moray.runtime.store.store import Store

PROMPT = [3, 17, 42, 99, 7, 150, 23, 64, 5, 88, 120, 31]
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
_QWEN = {"moe_intermediate_size": 64}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


KEPT: dict[str, tuple[str, Callable[[Path], Pair]]] = {
    "mxfp4": ("fp4", write_mxfp4_pair),
    "gptq": ("q4", lambda path: write_pair(path, "mixtral", gptq(), _GPTQ)),
    "gptq-v2": (
        "q4",
        lambda path: write_pair(path, "mixtral", gptq(zero_offset=0), _GPTQ | {"checkpoint_format": "gptq_v2"}),
    ),
    "gptq-static-groups": (
        "q4",
        lambda path: write_pair(path, "mixtral", gptq(), _GPTQ | {"desc_act": True, "static_groups": True}),
    ),
    "gptq-one-group": ("q4", lambda path: write_pair(path, "mixtral", gptq(group=-1), _GPTQ | {"group_size": -1})),
    "gptq-8-bits": ("q8", lambda path: write_pair(path, "qwen3_moe", gptq(bits=8), _GPTQ | {"bits": 8}, **_QWEN)),
    "gptq-2-bits": ("q2", lambda path: write_pair(path, "mixtral", gptq(bits=2), _GPTQ | {"bits": 2})),
    "awq": ("q4", lambda path: write_pair(path, "qwen3_moe", awq, _AWQ, **_QWEN)),
    "packed": (
        "q4",
        lambda path: write_pair(path, "qwen3_moe", packed(), compressed("pack-quantized", num_bits=4), **_QWEN),
    ),
    "packed-with-zeros": (
        "q4",
        lambda path: write_pair(
            path,
            "mixtral",
            packed(symmetric=False, dtype=torch.float16),
            compressed("pack-quantized", num_bits=4, symmetric=False),
        ),
    ),
    "int8": ("q8", lambda path: write_pair(path, "mixtral", int8, compressed("int-quantized", num_bits=8))),
    "int8-with-zeros": (
        "q8",
        lambda path: write_pair(
            path, "qwen3_moe", int8_with_zeros, compressed("naive-quantized", num_bits=8, symmetric=False), **_QWEN
        ),
    ),
    "mxfp4-everywhere": (
        "fp4",
        lambda path: write_pair(
            path, "mixtral", mxfp4, compressed("mxfp4-pack-quantized", num_bits=4, type="float"), dtype=torch.bfloat16
        ),
    ),
    "mxfp4-in-int8": (
        "fp4",
        lambda path: write_pair(path, "qwen3_moe", mxfp4_in_int8, _FP8, dtype=torch.bfloat16, **_QWEN),
    ),
}


@pytest.fixture(scope="module", params=KEPT)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Pair, Path]:
    encoding, write = KEPT[request.param]
    root = tmp_path_factory.mktemp(request.param)
    pair = write(root)
    convert(pair.quantized, root / "store", "keep")
    return encoding, pair, root / "store"


def assert_equal_bits(store: Path, model: PreTrainedModel) -> Manifest:
    """Every weight of the store is the model's, in float32."""
    expected = model.state_dict()
    with Store.open(store) as opened:
        state = state_of_store(opened, model)
        manifest = opened.manifest
    assert set(expected) - set(state) <= set(model.all_tied_weights_keys)
    for name, tensor in state.items():
        actual, wanted = tensor.float().contiguous(), expected[name].float().contiguous()
        assert torch.equal(actual.view(torch.int32), wanted.view(torch.int32)), name
    return manifest


def test_kept_weights_equal_the_reference_bit_for_bit(kept: tuple[str, Pair, Path]) -> None:
    encoding, pair, store = kept
    manifest = assert_equal_bits(store, stock_model(pair.plain))
    encodings = {t.spec.encoding for layer in manifest.layers for t in layer.layout.tensors if t.spec}
    assert encodings == {encoding}
    assert set(manifest.recipe.values()) == {"keep"}
    assert all("activations" in note for note in manifest.notes)


def test_kept_codes_compute_what_the_dequantized_model_does(kept: tuple[str, Pair, Path]) -> None:
    """Logits of a prompt, and tokens one by one: the fused layers and blocks where the family has them."""
    _, pair, store = kept
    model = stock_model(pair.plain)
    expected = stock_logits(model, PROMPT)
    assert expected.std() > 0.1
    with runner(store, "float") as made:
        assert (made.logits(PROMPT) - expected).abs().max() / max(1.0, expected.abs().max().item()) < 1e-5
        tokens = greedy(made, PROMPT, 12)
    assert tokens == stock_greedy(model, PROMPT, 12)


def test_fp4_in_the_trunk_and_in_blocks_of_one_call_has_the_bits_of_its_parts(tmp_path: Path) -> None:
    _, write = KEPT["mxfp4-everywhere"]
    convert(write(tmp_path).quantized, tmp_path / "store", "keep")
    with runner(tmp_path / "store", "int8") as made, torch.inference_mode():
        linears = [module for module in made.model.modules() if isinstance(module, PackedLinear)]
        assert {module.spec.encoding for module in linears if module is not made.model.lm_head} == {"fp4"}
        fused = [vars(module).get("forward") for module in made.model.modules()]
        assert sum(isinstance(forward, FusedLayer) for forward in fused) == 3
        blocks = [module for module in made.model.modules() if isinstance(vars(module).get("forward"), FusedBlock)]
        assert len(blocks) == 3
        for tokens in (1, 3, 40):
            for block in blocks:
                x = torch.randn(1, tokens, block.experts.hidden_dim)
                assert torch.equal(block(x), type(block).forward(block, x))


def test_act_order_is_dequantized_but_not_kept(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "mixtral", gptq(reorder=True), _GPTQ | {"desc_act": True})
    convert(pair.quantized, tmp_path / "store", "none")
    assert_equal_bits(tmp_path / "store", stock_model(pair.plain).half())
    with pytest.raises(CheckpointError, match=r"act-order.*convert with another recipe: `none`"):
        convert(pair.quantized, tmp_path / "kept", "keep")
    assert not (tmp_path / "kept").exists()


def test_mxfp4_equals_transformers_own_loading(tmp_path: Path) -> None:
    pair = write_mxfp4_pair(tmp_path)
    convert(pair.quantized, tmp_path / "store", "keep")
    assert_equal_bits(tmp_path / "store", stock_model(pair.quantized))


FP8 = {
    "blocks": (fp8((16, 32)), _FP8 | {"weight_block_size": [16, 32]}),
    "per-tensor": (fp8(None, dims=0), _FP8 | {"weight_block_size": None}),
    "e5m2": (fp8((16, 32), dtype=torch.float8_e5m2), _FP8 | {"weight_block_size": [16, 32], "fmt": "e5m2"}),
    "powers": (
        fp8((16, 32), scale_dtype=torch.float8_e8m0fnu),
        _FP8 | {"weight_block_size": [16, 32], "scale_fmt": "ue8m0"},
    ),
    "powers-in-bytes": (
        fp8((1, 32), scale_dtype=torch.uint8),
        _FP8 | {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
    ),
    "static-activations": (
        fp8(None, dims=0, activations="activation_scale"),
        _FP8 | {"weight_block_size": None, "activation_scheme": "static"},
    ),
}


@pytest.mark.parametrize("form", FP8)
@pytest.mark.parametrize(("recipe", "dtype"), [("keep", torch.bfloat16), ("none", torch.float32)])
def test_fp8_equals_transformers_dequantization(form: str, recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    quantize, config = FP8[form]
    pair = write_pair(tmp_path, "deepseek_v3", quantize, config, dtype=dtype, moe_intermediate_size=64)
    manifest = convert(pair.quantized, tmp_path / "store", recipe)
    model = AutoModelForCausalLM.from_pretrained(pair.quantized, dtype=dtype)
    assert_equal_bits(tmp_path / "store", model)
    assert any("FP8 has no packed form" in note for note in manifest.notes) == (recipe == "keep")
    assert any("activations" in note and "not used" in note for note in manifest.notes)
    assert not any("not used by the model" in note for note in manifest.notes)


_FLOAT8 = {"num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("quantize", "config"),
    [
        (fp8((32, 48)), _FP8 | {"weight_block_size": [32, 48]}),
        (fp8(None, "weight_scale"), _FP8),
        (fp8((1, 0), "weight_scale", scale_dtype=torch.bfloat16), compressed("float-quantized", **_FLOAT8)),
        (fp8(None, "weight_scale", dims=1), compressed("naive-quantized", **_FLOAT8)),
        (fp8((16, 48), "weight_scale"), compressed("float-quantized", block_structure=[16, 48], **_FLOAT8)),
    ],
    ids=["ragged-blocks", "per-tensor", "compressed-rows", "compressed-tensors", "compressed-blocks"],
)
def test_fp8_equals_its_definition_where_transformers_does_not_read_it(
    quantize: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    """Blocks that do not divide a weight (the published DeepSeek-V3 has some), and scales named weight_scale."""
    pair = write_pair(tmp_path, "mixtral", quantize, config, dtype=torch.float32)
    convert(pair.quantized, tmp_path / "store", "none")
    assert_equal_bits(tmp_path / "store", stock_model(pair.plain))


@pytest.mark.parametrize("grid", [(8, 4, 2), (8, 1, 1), (8,), (1,), ()], ids=str)
def test_fp8_experts_of_one_tensor_have_scales_of_their_own_or_one_for_all(
    grid: tuple[int, ...], tmp_path: Path
) -> None:
    base = tiny_checkpoint("qwen3_moe", tmp_path / "base", torch.float32, fused=True, moe_intermediate_size=32)
    pair = Pair(tmp_path / "quantized", tmp_path / "plain")
    quantized, plain, rng = {}, {}, torch.Generator().manual_seed(0)
    for key, tensor in load_file(base / "model.safetensors").items():
        quantized[key] = plain[key] = tensor
        if ".experts." in key:
            scales = torch.rand(grid, generator=rng) / 1000 + 0.0005
            quantized[key], quantized[f"{key}_scale_inv"] = (tensor * 1000).to(torch.float8_e4m3fn), scales
            wide = scales.reshape(grid if len(grid) == 3 else (*grid, 1, 1) if grid else (1, 1, 1))
            for dim in (1, 2):
                wide = wide.repeat_interleave(tensor.shape[dim] // wide.shape[dim], dim=dim)
            plain[key] = quantized[key].float() * wide
    for path, tensors in ((pair.quantized, quantized), (pair.plain, plain)):
        path.mkdir()
        document = json.loads((base / "config.json").read_text())
        document |= {"quantization_config": _FP8} if path is pair.quantized else {}
        (path / "config.json").write_text(json.dumps(document))
        save_file(tensors, path / "model.safetensors")
    convert(pair.quantized, tmp_path / "store", "none")
    assert_equal_bits(tmp_path / "store", stock_model(pair.plain))


def test_workers_make_the_same_bytes(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "qwen3_moe", awq, _AWQ, num_hidden_layers=1, **_QWEN)
    manifests = [convert(pair.quantized, tmp_path / f"store{n}", "keep", workers=n) for n in (1, 2)]
    assert manifests[0].shards == manifests[1].shards
    assert manifests[0].trunk_checksum == manifests[1].trunk_checksum


def test_other_recipes_quantize_the_dequantized_weights(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "mixtral", gptq(), _GPTQ)
    manifest = convert(pair.quantized, tmp_path / "store", "experts=hqq8:32,attention=keep")
    assert manifest.recipe["experts"] == "hqq8:32" and manifest.recipe["attention"] == "keep"
    model = stock_model(pair.plain)
    expected = model.state_dict()
    with Store.open(tmp_path / "store") as opened:
        state = state_of_store(opened, model)
    for name, tensor in state.items():
        if ".experts." in name:
            assert torch.nn.functional.mse_loss(tensor, expected[name]).sqrt() < 0.01 * expected[name].std(), name
        else:
            assert torch.equal(tensor.float(), expected[name]), name


def test_recipe_none_is_what_16_bit_loaders_have(tmp_path: Path) -> None:
    """GPTQ's codes times float16 scales, rounded to float16."""
    pair = write_pair(tmp_path, "mixtral", gptq(), _GPTQ)
    convert(pair.quantized, tmp_path / "store", "none")
    model = stock_model(pair.plain).half()
    assert_equal_bits(tmp_path / "store", model)

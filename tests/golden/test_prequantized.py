"""Pre-quantized checkpoints: kept codes stand for exactly the weights that their formats define."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.prequantized import Pair, awq, fp8, gptq, int8, packed, write_mxfp4_pair, write_pair
from helpers.reference import runner, stock_logits, stock_model
from helpers.stores import state_of_store
from transformers import AutoModelForCausalLM, PreTrainedModel

from moray.runtime.convert.converter import convert
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
    assert set(manifest.recipe.values()) == {"keep"} and not manifest.notes


def test_logits_of_kept_codes_equal_the_dequantized_model(kept: tuple[str, Pair, Path]) -> None:
    _, pair, store = kept
    expected = stock_logits(stock_model(pair.plain), PROMPT)
    assert expected.std() > 0.1
    with runner(store, "float") as made:
        assert (made.logits(PROMPT) - expected).abs().max() / max(1.0, expected.abs().max().item()) < 1e-5


def test_mxfp4_equals_transformers_own_loading(tmp_path: Path) -> None:
    pair = write_mxfp4_pair(tmp_path)
    convert(pair.quantized, tmp_path / "store", "keep")
    assert_equal_bits(tmp_path / "store", stock_model(pair.quantized))


@pytest.mark.parametrize(
    ("quantize", "config"),
    [
        (fp8((16, 32)), _FP8 | {"weight_block_size": [16, 32]}),
        (fp8(None, dims=0), _FP8 | {"weight_block_size": None}),
    ],
    ids=["blocks", "per-tensor"],
)
@pytest.mark.parametrize("recipe", ["none", "keep"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_equals_transformers_dequantization(
    quantize: Any, config: dict[str, Any], recipe: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    sizes = {"moe_intermediate_size": 64}
    pair = write_pair(tmp_path, "deepseek_v3", quantize, config, dtype=dtype, **sizes)
    manifest = convert(pair.quantized, tmp_path / "store", recipe)
    model = AutoModelForCausalLM.from_pretrained(pair.quantized, dtype=dtype)
    assert_equal_bits(tmp_path / "store", model)
    assert any("FP8" in note for note in manifest.notes) == (recipe == "keep")


@pytest.mark.parametrize("block", [(32, 48), None], ids=["ragged-blocks", "per-tensor"])
def test_fp8_equals_its_definition_where_transformers_refuses(block: tuple[int, int] | None, tmp_path: Path) -> None:
    """Blocks that do not divide a weight (the published DeepSeek-V3 has some), and scales named weight_scale."""
    config = _FP8 | {"weight_block_size": list(block) if block else None}
    suffix = "weight_scale_inv" if block else "weight_scale"
    pair = write_pair(tmp_path, "mixtral", fp8(block, suffix), config, dtype=torch.float32)
    convert(pair.quantized, tmp_path / "store", "none")
    assert_equal_bits(tmp_path / "store", stock_model(pair.plain))


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

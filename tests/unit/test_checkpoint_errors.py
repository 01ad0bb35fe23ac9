"""Every wrong input to a conversion: a clear error of one line, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.checkpoints import tiny_checkpoint
from safetensors.torch import load_file, save_file

from moray.runtime.convert.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from moray.runtime.convert.converter import convert
from moray.runtime.errors import CheckpointError, InputError, StoreError, UnsupportedModelError

LAST = "model.layers.2.block_sparse_moe.experts.7.w2.weight"
Edit = Callable[[Path], object]


@pytest.fixture
def path(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("mixtral"), tmp_path / "checkpoint"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_checkpoint("mixtral", tmp_path / "sharded", max_shard_size="500KB")


def refused(path: Path, store: Path | None = None, kind: type[InputError] = CheckpointError) -> str:
    """Convert, expect an error, and return its message."""
    target = store or path.parent / "store"
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(kind) as caught:
        convert(path, target)
    assert sorted(target.parent.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / SINGLE_NAME)
    edit(tensors)
    save_file(tensors, path / SINGLE_NAME)


def write_header(path: Path, header: bytes) -> None:
    (path / SINGLE_NAME).write_bytes(len(header).to_bytes(8, "little") + header)


# ---------------------------------------------------------------------------------------- config


def test_no_directory(tmp_path: Path) -> None:
    assert "not a directory" in refused(tmp_path / "nowhere")


def test_no_config(path: Path) -> None:
    (path / "config.json").unlink()
    assert "has no config.json" in refused(path)


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '{"model_type": "mixtral", "hidden_size": "many"}'])
def test_damaged_config(path: Path, text: str) -> None:
    (path / "config.json").write_text(text)
    assert "config.json" in refused(path)


def test_unknown_model_type(path: Path) -> None:
    edit_config(path, model_type="mixtrel")
    message = refused(path, kind=UnsupportedModelError)
    assert "'mixtrel'" in message and "mixtral" in message and "qwen3_moe" in message


def test_dense_model(path: Path) -> None:
    edit_config(path, model_type="llama")
    document = json.loads((path / "config.json").read_text())
    del document["num_local_experts"], document["num_experts_per_tok"]
    (path / "config.json").write_text(json.dumps(document))
    assert "dense" in refused(path, kind=UnsupportedModelError)


def test_dense_config_of_a_family_with_experts(tmp_path: Path) -> None:
    path = tiny_checkpoint("glm4_moe", tmp_path / "checkpoint", first_k_dense_replace=3)
    assert "dense" in refused(path, kind=UnsupportedModelError)


def test_experts_outside_the_interface(path: Path) -> None:
    transformers.JetMoeConfig(num_local_experts=4).save_pretrained(path)
    message = refused(path, kind=UnsupportedModelError)
    assert "not routed through" in message and "mixtral" in message


def test_quantized_checkpoint(path: Path) -> None:
    edit_config(path, quantization_config={"quant_method": "gptq", "bits": 4})
    message = refused(path)
    assert "gptq" in message and "pre-quantized" in message


def test_config_of_another_size(path: Path) -> None:
    edit_config(path, intermediate_size=128)
    assert "does not fit its config.json" in refused(path)


def test_config_with_more_layers(path: Path) -> None:
    edit_config(path, num_hidden_layers=4)
    assert "model.layers.3.mlp.experts.gate_up_proj" in refused(path)


def test_config_with_more_experts(path: Path) -> None:
    edit_config(path, num_local_experts=9)
    assert "expert 8 of MoE layer 0" in refused(path)


# ----------------------------------------------------------------------------------------- files


def test_no_weights(path: Path) -> None:
    (path / SINGLE_NAME).unlink()
    assert "has no weights" in refused(path)


def test_weights_in_another_format(path: Path) -> None:
    (path / SINGLE_NAME).rename(path / "pytorch_model.bin")
    message = refused(path)
    assert "pytorch_model.bin" in message and "safetensors" in message


def test_missing_file_of_an_index(sharded: Path) -> None:
    files = sorted(sharded.glob("model-*.safetensors"))
    assert len(files) > 3
    files[1].unlink()
    assert files[1].name in refused(sharded)


def test_key_of_an_index_in_no_file(sharded: Path) -> None:
    file = sharded / INDEX_NAME
    document = json.loads(file.read_text())
    document["weight_map"]["model.extra.weight"] = document["weight_map"][LAST]
    file.write_text(json.dumps(document))
    assert "model.extra.weight" in refused(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index(sharded: Path, text: str) -> None:
    (sharded / INDEX_NAME).write_text(text)
    assert INDEX_NAME in refused(sharded)


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_file_cut_short(path: Path, kept: int) -> None:
    data = (path / SINGLE_NAME).read_bytes()
    (path / SINGLE_NAME).write_bytes(data[:kept])
    message = refused(path)
    assert SINGLE_NAME in message and "cut short" in message


def test_sharded_file_cut_short(sharded: Path) -> None:
    file = sorted(sharded.glob("model-*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-1])
    assert file.name in refused(sharded)


@pytest.mark.parametrize(
    "header",
    [b"not json", b"[1]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"\xff\xff"],
)
def test_damaged_header(path: Path, header: bytes) -> None:
    write_header(path, header)
    assert "header" in refused(path)


# --------------------------------------------------------------------------------------- tensors


def test_missing_expert_tensor(path: Path) -> None:
    edit_tensors(path, lambda tensors: tensors.pop(LAST))
    message = refused(path)
    assert "expert 7 of MoE layer 2" in message and "down_proj" in message


def test_missing_projection_of_a_layer(path: Path) -> None:
    def drop_all_up(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".layers.1." in key and ".w3." in key]:
            del tensors[key]

    edit_tensors(path, drop_all_up)
    assert "model.layers.1.mlp.experts.gate_up_proj" in refused(path)


def test_missing_trunk_tensor(path: Path) -> None:
    edit_tensors(path, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    assert "model.layers.1.self_attn.k_proj.weight" in refused(path)


def test_tensor_of_another_shape(path: Path) -> None:
    edit_tensors(path, lambda tensors: tensors.update({LAST: tensors[LAST][:-1].contiguous()}))
    message = refused(path)
    assert LAST in message and "[1, 64, 96]" in message


def test_tensor_of_another_type(path: Path) -> None:
    edit_tensors(path, lambda tensors: tensors.update({LAST: tensors[LAST].to(torch.float8_e4m3fn)}))
    message = refused(path)
    assert LAST in message and "F8_E4M3" in message and "pre-quantized" in message


def test_integer_weights(path: Path) -> None:
    key = "model.layers.1.self_attn.k_proj.weight"
    edit_tensors(path, lambda tensors: tensors.update({key: tensors[key].to(torch.int32)}))
    assert key in refused(path)


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    path = tiny_checkpoint("granitemoe", tmp_path / "checkpoint")
    edit_tensors(path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(200, 64)}))
    assert "tie_word_embeddings" in refused(path)


def test_a_tensor_that_shrinks_while_it_is_read(path: Path) -> None:
    opened = Checkpoint.open(path)
    (path / SINGLE_NAME).write_bytes((path / SINGLE_NAME).read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match="became shorter"):
        opened.read(LAST)


# ---------------------------------------------------------------------------------------- places


def test_the_store_may_not_be_the_checkpoint(path: Path) -> None:
    for store in (path, path / "store", path.parent):
        assert "overlap" in refused(path, store, StoreError)


def test_the_store_may_not_hold_other_files(path: Path, tmp_path: Path) -> None:
    store = tmp_path / "photos"
    store.mkdir()
    (store / "cat.jpg").write_bytes(b"")
    assert "cat.jpg" in refused(path, store, StoreError)


def test_the_store_may_not_be_a_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "is a file" in refused(path, tmp_path / "file", StoreError)


def test_a_complete_store_is_not_overwritten(path: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint("mixtral", tmp_path / "other", seed=1), tmp_path / "store")
    assert "already a complete store" in refused(path, tmp_path / "store", StoreError)

"""Pre-quantized checkpoints that cannot be read or kept: one line that says what was found and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.prequantized import Pair, Tensors, awq, fp8, gptq, int8, mxfp4, packed, write_mxfp4_pair, write_pair
from safetensors.torch import load_file, save_file

from moray.runtime.convert.converter import convert
from moray.runtime.errors import CheckpointError

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 32]}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
}
WRITERS: dict[str, Callable[[Path], Pair]] = {
    "gptq": lambda path: write_pair(path, "mixtral", gptq(), GPTQ),
    "awq": lambda path: write_pair(path, "mixtral", awq, AWQ),
    "fp8": lambda path: write_pair(path, "mixtral", fp8((16, 32)), FP8),
    "packed": lambda path: write_pair(path, "mixtral", packed(), PACKED),
    "int8": lambda path: write_pair(path, "mixtral", int8, PACKED | {"format": "int-quantized"}),
    "compressed-mxfp4": lambda path: write_pair(path, "mixtral", mxfp4, PACKED | {"format": "mxfp4-pack-quantized"}),
    "mxfp4": write_mxfp4_pair,
}
_EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2."
_MXFP4 = "model.layers.1.mlp.experts.down_proj_"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(form: str) -> Path:
        if form not in made:
            made[form] = WRITERS[form](tmp_path_factory.mktemp(form)).quantized
        return made[form]

    return get


class Edited:
    """A copy of a checkpoint, to be damaged."""

    def __init__(self, original: Path, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._config = json.loads((original / "config.json").read_text())
        self._tensors = load_file(original / "model.safetensors")

    def refused(self, recipe: str = "none", settings: dict[str, Any] | None = None) -> str:
        """Write it, expect an error of one line when it is converted, and return the message."""
        document = self._config | {"quantization_config": self._config["quantization_config"] | (settings or {})}
        (self.path / "config.json").write_text(json.dumps(document))
        save_file({key: tensor.contiguous() for key, tensor in self._tensors.items()}, self.path / "model.safetensors")
        with pytest.raises(CheckpointError) as caught:
            convert(self.path, self.path.parent / "store", recipe)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def edit(self, change: Callable[[Tensors], object]) -> Edited:
        change(self._tensors)
        return self


@pytest.fixture
def edited(originals: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Edited]:
    return lambda form: Edited(originals(form), tmp_path / "checkpoint")


def groups(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": weights}}}


# --------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("form", "settings", "found", "expected"),
    [
        ("gptq", {"quant_method": "bitnet"}, "'bitnet'", "gptq, awq, mxfp4, fp8, compressed-tensors"),
        ("gptq", {"quant_method": None}, "'unknown'", "gptq, awq, mxfp4, fp8, compressed-tensors"),
        ("gptq", {"bits": 3}, "bits 3", "2 or 4 or 8"),
        ("gptq", {"bits": "4"}, "bits '4'", "2 or 4 or 8"),
        ("gptq", {"bits": 8}, "has shape", "does not fit its config.json"),
        ("gptq", {"group_size": 0}, "group_size 0", "-1 or a number"),
        ("gptq", {"group_size": None}, "group_size None", "-1 or a number"),
        ("gptq", {"group_size": 24}, "scales has shape", "does not fit its config.json"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'", "gptq or gptq_v2"),
        ("gptq", {"is_marlin_format": True}, "checkpoint_format 'marlin'", "gptq or gptq_v2"),
        ("gptq", {"quant_method": "mxfp4"}, "none of its tensors is", "delete quantization_config"),
        ("awq", {"bits": 3}, "bits 3", "expected 4"),
        ("awq", {"version": "gemv"}, "version 'gemv'", "gemm"),
        ("awq", {"quant_method": "gptq"}, "has shape", "does not fit its config.json"),
        ("packed", {"format": "marlin-24"}, "format 'marlin-24'", "pack-quantized"),
        ("packed", {"format": 7}, "format '7'", "pack-quantized"),
        ("packed", {"config_groups": []}, "num_bits ''", "4 or 8"),
        ("packed", {"config_groups": {"a": {"weights": 5}, "b": 3}}, "num_bits ''", "4 or 8"),
        ("packed", groups(num_bits=3), "num_bits '3'", "4 or 8"),
        ("packed", groups(num_bits=8), "has shape", "does not fit its config.json"),
        ("packed", groups(num_bits=4, symmetric=False), "but no", "weight_zero_point"),
    ],
)
def test_settings_that_are_not_read(
    form: str, settings: dict[str, Any], found: str, expected: str, edited: Callable[[str], Edited]
) -> None:
    message = edited(form).refused(settings=settings)
    assert found in message and expected in message


# ---------------------------------------------------------------------------------- tensors


def put(key: str, value: float, *place: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors[key].__setitem__(place, value)


def take(*keys: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(key) for key in keys] and None


def cut(key: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(key, tensors[key][tuple(slice(size) for size in shape)])


@pytest.mark.parametrize("recipe", ["none", "keep"])
@pytest.mark.parametrize(
    ("form", "change", "found"),
    [
        ("gptq", take(f"{_EXPERT}qzeros"), f"but no {_EXPERT}qzeros"),
        ("gptq", take(f"{_EXPERT}qweight"), "has 0 tensors"),
        ("gptq", cut(f"{_EXPERT}scales", 2, 64), f"{_EXPERT}scales has shape [2, 64], expected [3, 64]"),
        ("gptq", cut(f"{_EXPERT}g_idx", 90), f"{_EXPERT}g_idx has shape [90], expected [96]"),
        ("gptq", put(f"{_EXPERT}scales", float("nan"), 1, 5), f"{_EXPERT}scales holds a scale that is not a number"),
        ("gptq", put(f"{_EXPERT}scales", 0.0, 1, 5), f"{_EXPERT}scales holds a scale of 0 for weights that are not 0"),
        ("gptq", put(f"{_EXPERT}g_idx", 3, 7), f"{_EXPERT}g_idx holds group 3"),
        ("gptq", put(f"{_EXPERT}g_idx", -1, 7), f"{_EXPERT}g_idx holds group"),
        ("gptq", lambda t: t.__setitem__(f"{_EXPERT}weight", torch.ones(64, 96)), "both quantized and in 16 bits"),
        ("awq", put(f"{_EXPERT}scales", float("inf"), 1, 5), f"{_EXPERT}scales holds a scale that is not a number"),
        ("awq", take(f"{_EXPERT}scales"), f"but no {_EXPERT}scales"),
        ("packed", take(f"{_EXPERT}weight_scale"), f"but no {_EXPERT}weight_scale"),
        ("packed", cut(f"{_EXPERT}weight_scale", 5, 3), "weight_scale has shape [5, 3], expected [64,"),
        ("packed", put(f"{_EXPERT}weight_scale", float("nan"), 5, 1), "a scale that is not a number"),
        ("int8", put(f"{_EXPERT}weight_scale", 0.0, 5, 0), "a scale of 0 for weights that are not 0"),
        ("int8", cut(f"{_EXPERT}weight_scale", 5, 1), "weight_scale has shape [5, 1]"),
        ("fp8", take(f"{_EXPERT}weight_scale_inv"), f"no scales for {_EXPERT}weight"),
        ("fp8", cut(f"{_EXPERT}weight_scale_inv", 3, 3), "weight_scale_inv has shape [3, 3], expected [4, 3]"),
        ("fp8", put(f"{_EXPERT}weight_scale_inv", float("nan"), 1, 1), "a scale that is not a number"),
        ("fp8", put(f"{_EXPERT}weight_scale_inv", 0.0, 1, 1), "a scale of 0 for weights that are not 0"),
        ("fp8", put(f"{_EXPERT}weight", float("nan"), 1, 1), f"{_EXPERT}weight, expert"),
        ("mxfp4", take(f"{_MXFP4}scales"), f"but no {_MXFP4}scales"),
        ("mxfp4", cut(f"{_MXFP4}scales", 8, 64, 2), f"{_MXFP4}scales has shape [8, 64, 2], expected [8, 64, 3]"),
        ("mxfp4", cut(f"{_MXFP4}blocks", 8, 64, 3, 15), "expected [8, 64, 3, 16]"),
        ("mxfp4", put(f"{_MXFP4}scales", 255, 3, 5, 1), f"{_MXFP4}scales holds a scale that is not a number"),
        ("compressed-mxfp4", cut(f"{_EXPERT}weight_scale", 64, 2), "weight_scale has shape [64, 2], expected [64, 3]"),
        ("compressed-mxfp4", put(f"{_EXPERT}weight_scale", 255, 5, 1), "a scale that is not a number"),
    ],
)
def test_damaged_tensors(
    form: str, change: Callable[[Tensors], object], found: str, recipe: str, edited: Callable[[str], Edited]
) -> None:
    assert found.removesuffix(", expert") in edited(form).edit(change).refused(recipe)


# ------------------------------------------------------------------------------------- keep


@pytest.mark.parametrize(
    ("form", "change", "found"),
    [
        ("gptq", lambda t: t[f"{_EXPERT}g_idx"].copy_(t[f"{_EXPERT}g_idx"].roll(1)), "act-order"),
        ("gptq", lambda t: t.__setitem__(f"{_EXPERT}scales", t[f"{_EXPERT}scales"].float() / 3), "more digits"),
        ("packed", put(f"{_EXPERT}weight_scale", 1e36, 5, 1), "a scale or zero does not fit float16"),
        ("mxfp4", put(f"{_MXFP4}scales", 0, 3, 5, 1), "the smallest that can be kept is 2**-126"),
        ("gptq", lambda t: dequantized(t, _EXPERT.replace("w2", "w1"), (96, 64)), "quantized in another way"),
    ],
    ids=["order", "digits", "range", "smallest", "half-a-matrix"],
)
def test_what_cannot_be_kept_is_refused_with_another_recipe(
    form: str, change: Callable[[Tensors], object], found: str, edited: Callable[[str], Edited], tmp_path: Path
) -> None:
    made = edited(form).edit(change)
    message = made.refused("keep")
    assert found in message and "convert with another recipe: `none`" in message and "hqq4" in message
    convert(made.path, tmp_path / "dequantized", "none")


def dequantized(tensors: Tensors, base: str, shape: tuple[int, int]) -> None:
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[base + name]
    tensors[f"{base}weight"] = torch.ones(shape, dtype=torch.float16)


def test_act_order_is_refused_before_anything_is_written(edited: Callable[[str], Edited], tmp_path: Path) -> None:
    message = edited("gptq").refused("keep", {"desc_act": True})
    assert "act-order" in message and "`none`" in message
    assert not (tmp_path / "store").exists()


# ------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("as_file", [True, False])
def test_gguf_files(as_file: bool, tmp_path: Path) -> None:
    file = tmp_path / "mixtral.Q4_0.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(
        CheckpointError, match=r"is a GGUF file.*convert the checkpoint that it was made from"
    ) as caught:
        convert(file if as_file else tmp_path, tmp_path / "store")
    assert "\n" not in str(caught.value)

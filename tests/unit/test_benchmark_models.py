"""The random models of benchmarks/: a store as the converter would write it, and a GGUF file of the same sizes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moray.runtime.convert.converter import convert
from moray.runtime.convert.recipe import Recipe
from moray.runtime.generation.request import GenerationRequest
from moray.runtime.store.manifest import ShardEntry
from moray.runtime.store.store import Store

_RECIPES = ["none", "experts=hqq4:64,attention=hqq4:64,embeddings=hqq4:64", "experts=hqq3:32,attention=hqq2:32:s8"]
_PRESETS = ["tiny", "tiny-qwen"]


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[SimpleNamespace]:
    """The benchmarks' modules, by name."""
    names = ("common", "geometry", "gguf_file", "gguf_model", "make_checkpoint", "make_gguf", "make_store")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def _places(shards: dict) -> dict:
    return {key: replace(entry, checksum=0) for key, entry in shards.items() if isinstance(entry, ShardEntry)}


@pytest.mark.parametrize("preset", _PRESETS)
@pytest.mark.parametrize("recipe", _RECIPES)
def test_a_store_is_what_the_converter_makes(
    benchmarks: SimpleNamespace, tmp_path: Path, preset: str, recipe: str
) -> None:
    geometry = replace(benchmarks.geometry.PRESETS[preset], intermediate=64, experts=4, layers=2, vocab=128, active=2)
    checkpoint = benchmarks.make_checkpoint.write_checkpoint(tmp_path / "checkpoint", geometry)
    expected = convert(checkpoint, tmp_path / "converted", recipe)
    with Store.open(benchmarks.make_store.write_store(tmp_path / "store", geometry, Recipe.parse(recipe))) as store:
        found = store.manifest
        for key in found.shards:
            store.read_shard(key)  # checks it
    for name in ("family", "recipe", "layers", "packed_trunk", "trunk_bytes", "num_parameters", "notes"):
        assert getattr(found, name) == getattr(expected, name), name
    assert _places(found.shards) == _places(expected.shards)
    assert found.num_parameters == geometry.num_parameters


@pytest.mark.parametrize("preset", _PRESETS)
def test_a_store_generates_and_routes_evenly(benchmarks: SimpleNamespace, tmp_path: Path, preset: str) -> None:
    geometry = replace(benchmarks.geometry.PRESETS[preset], layers=4)
    path = benchmarks.make_store.write_store(tmp_path / "store", geometry, Recipe.parse(_RECIPES[1]))
    prompt = np.random.default_rng(0).integers(0, geometry.vocab, 256).tolist()
    with benchmarks.common.in_process(path) as runner:
        logits = runner.logits(prompt)
        counts = np.array(runner.stats().tokens_per_expert)
        events = list(runner.stream(GenerationRequest("one", tuple(prompt[:8]), 4)))
    assert len([token for event in events for token in event.token_ids]) == 4
    assert torch.isfinite(logits).all() and 0.05 < float(logits.std()) < 5
    assert len(set(logits.argmax(1).tolist())) > 64  # positions differ
    even = len(prompt) * geometry.active / geometry.experts
    assert counts.shape == (4, geometry.experts)
    assert counts.min() > even / 3 and counts.max() < 3 * even


@pytest.mark.parametrize("preset", _PRESETS)
def test_a_gguf_file_has_the_same_weights_at_4_5_bits(benchmarks: SimpleNamespace, tmp_path: Path, preset: str) -> None:
    geometry = benchmarks.geometry.PRESETS[preset]
    path = benchmarks.make_gguf.make_gguf(tmp_path / "model.gguf", geometry)
    tensors = benchmarks.gguf_file.read_tensors(path)
    assert sum(tensor.count for tensor in tensors) == geometry.num_parameters
    for tensor in tensors:
        is_plain = benchmarks.gguf_model.class_of(tensor.name) == "norms, routers"
        assert 8 * tensor.num_bytes == tensor.count * (32 if is_plain else 4.5), tensor
    (experts,) = [tensor for tensor in tensors if tensor.name == "blk.1.ffn_down_exps.weight"]
    assert experts.shape == (geometry.experts, geometry.hidden, geometry.intermediate)
    assert path.stat().st_size > sum(tensor.num_bytes for tensor in tensors)


def test_random_q4_0_blocks_have_mean_0(benchmarks: SimpleNamespace) -> None:
    tensor = benchmarks.gguf_file.GgufTensor("blk.0.attn_q.weight", (4096, 1024), "Q4_0")
    pieces = benchmarks.make_gguf.RandomTensors(0).slices(tensor)
    blocks = np.concatenate([np.frombuffer(piece, dtype=np.uint8) for piece in pieces]).reshape(-1, 18)
    assert blocks.nbytes == tensor.num_bytes
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float64)
    weights = (codes - 8) * blocks[:, :2].copy().view(np.float16)
    assert abs(weights.mean()) < 1e-4
    assert weights.std() == pytest.approx(0.02, rel=0.01)

"""Bad input: one line that says what was found, what was expected and what to do; exit code 2; nothing written."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from moray.deploy.cli import app
from moray.deploy.config import demo_store


def moray(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *fragments: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("error: "), result.output
    for fragment in fragments:
        assert fragment in errors[0], errors[0]


@pytest.fixture
def mixtral(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("mixtral"), tmp_path / "checkpoint"))


@pytest.fixture
def damaged_store(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_store(), tmp_path / "store"))


# ------------------------------------------------------------------------------- checkpoints


def refused_conversion(checkpoint: Path, *fragments: str, recipe: str = "hqq4") -> None:
    store = checkpoint.parent / "made"
    refused(moray("convert", checkpoint, store, "--recipe", recipe), *fragments)
    assert not store.exists()


def test_not_a_directory(tmp_path: Path) -> None:
    refused_conversion(tmp_path / "nothing", "nothing", "not a directory")


def test_no_safetensors(mixtral: Path) -> None:
    for file in mixtral.glob("*.safetensors"):
        file.unlink()
    refused_conversion(mixtral, "safetensors")


def test_a_file_named_by_the_index_is_missing(mixtral: Path) -> None:
    weights = load_file(mixtral / "model.safetensors")
    (mixtral / "model.safetensors").rename(mixtral / "model-00001-of-00002.safetensors")
    index = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    index[sorted(weights)[0]] = "model-00002-of-00002.safetensors"
    (mixtral / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    refused_conversion(mixtral, "model-00002-of-00002.safetensors", "missing")


def test_a_truncated_file(mixtral: Path) -> None:
    file = mixtral / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused_conversion(mixtral, "model.safetensors")


def test_a_corrupted_header(mixtral: Path) -> None:
    file = mixtral / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)
    refused_conversion(mixtral, "model.safetensors")


@pytest.mark.parametrize("name", ["block_sparse_moe.experts.3.w2", "self_attn.q_proj"])
def test_weights_that_are_not_numbers(mixtral: Path, name: str) -> None:
    weights = load_file(mixtral / "model.safetensors")
    key = next(key for key in sorted(weights) if name in key)
    weights[key][1, 2] = torch.nan
    save_file(weights, mixtral / "model.safetensors", metadata={"format": "pt"})
    store = mixtral.parent / "made"
    refused(moray("convert", mixtral, store), key, "NaN")
    # A damaged weight is found while converting: what was begun does not pass for a store.
    assert not (store / "manifest.msgpack").exists()


def rewrite_config(checkpoint: Path, **values: object) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_dense_model(mixtral: Path) -> None:
    (mixtral / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    refused_conversion(mixtral, "llama", "dense")


def test_an_unknown_family(mixtral: Path) -> None:
    rewrite_config(mixtral, model_type="mistral_of_tomorrow")
    refused_conversion(mixtral, "mistral_of_tomorrow", "mixtral", "qwen3_moe", "gpt_oss")


def test_an_unknown_recipe(mixtral: Path) -> None:
    refused_conversion(mixtral, "hqq5", "hqq4", recipe="experts=hqq5")


def test_an_adapter_of_another_model(mixtral: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    module = "base_model.model.model.layers.0.attention.wqkv"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 64), f"{module}.lora_B.weight": torch.ones(64, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    result = moray("convert", mixtral, tmp_path / "made", "--lora", adapter)
    refused(result, str(adapter), "layers.0.attention.wqkv.lora_A.weight")
    assert not (tmp_path / "made").exists()


def test_too_little_disk(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(mixtral)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused_conversion(mixtral, "1000 B", "free")


# ------------------------------------------------------------------------------------ stores


def test_a_store_of_a_newer_moray(damaged_store: Path) -> None:
    file = damaged_store / "manifest.msgpack"
    file.write_bytes(msgpack.packb(msgpack.unpackb(file.read_bytes()) | {"format": 99}))
    refused(moray("info", damaged_store), "format 99", "upgrade moray")
    refused(moray("generate", "x", "--store", damaged_store), "format 99", "upgrade moray")


def test_a_flipped_bit(damaged_store: Path) -> None:
    file = damaged_store / "experts-00004.bin"
    content = bytearray(file.read_bytes())
    content[2 * 196608 + 777] ^= 1
    file.write_bytes(content)
    assert moray("info", damaged_store).exit_code == 0
    refused(moray("info", damaged_store, "--verify"), "experts-00004.bin", "offset 393216", "checksum")


def test_a_checkpoint_given_as_a_store(mixtral: Path) -> None:
    refused(moray("generate", "x", "--store", mixtral), "moray convert")


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.runtime.memory.available_memory", lambda: 5 << 20)
    fragments = ["2.7 MiB trunk", "12.0 MiB the KV cache of 2048 tokens", "986.0 MiB", "5.0 MiB of memory are free"]
    refused(moray("generate", "x"), *fragments, "--context")
    plan = json.loads(moray("info", "--json").output)["memory"]["plan"]
    assert plan.startswith("none: ") and "5.0 MiB of memory are free" in plan


# -------------------------------------------------------------------------------- evaluation


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("import os\nimport sys\n" * 20)
    return file


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"", ["empty", "UTF-8"]),
        (b"caf\xe9", ["not UTF-8", "byte 3", "0xe9", "convert it"]),
        (None, ["cannot be read", "No such file"]),
    ],
)
def test_a_text_that_cannot_be_evaluated_on(tmp_path: Path, content: bytes | None, fragments: list[str]) -> None:
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    refused(moray("eval", "--text", file), "bad.txt", *fragments)


def test_a_text_of_one_token(damaged_store: Path, tmp_path: Path) -> None:
    rewrite_tokenizer(damaged_store, post_processor=None)  # else a begin token makes two of them
    (tmp_path / "short.txt").write_text("x")
    refused(moray("eval", damaged_store, "--text", tmp_path / "short.txt"), "short.txt", "1 token(s)", "at least 2")


def test_windows_that_no_model_takes(text: Path) -> None:
    refused(moray("eval", "--text", text, "--window", "1"), "--window is 1", "at least 2")
    refused(moray("eval", "--text", text, "--window", "2049"), "--window is 2049", "holds 2048 tokens", "smaller")
    refused(moray("eval", "--text", text, "--max-tokens", "1"), "--max-tokens is 1", "at least 2")


def rewrite_tokenizer(store: Path, **values: object) -> None:
    file = store / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_stores_that_cut_a_text_differently(damaged_store: Path, text: Path) -> None:
    model = json.loads((damaged_store / "tokenizer.json").read_text())["model"]
    rewrite_tokenizer(damaged_store, model=model | {"merges": []})
    for arguments in ([damaged_store, demo_store()], ["--reference", damaged_store]):
        refused(moray("eval", *arguments, "--text", text), str(damaged_store), str(demo_store()), "text.txt", "tokens")


def test_stores_of_different_vocabularies(store: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(store("mixtral"), tmp_path / "other"))
    for file in demo_store().glob("tokenizer*"):
        shutil.copy(file, other)
    refused(moray("eval", demo_store(), other, "--text", text), "vocabulary of 200", "4096", "one by one")


def test_a_store_without_a_tokenizer(store: Callable[..., Path], text: Path) -> None:
    refused(moray("eval", store("mixtral"), "--text", text), "no tokenizer", "copy")


def test_evaluation_of_what_is_no_store(mixtral: Path, text: Path) -> None:
    for arguments in ([mixtral], [demo_store(), mixtral], [demo_store(), "--reference", mixtral]):
        refused(moray("eval", *arguments, "--text", text), "moray convert")


def test_evaluation_of_a_store_that_memory_cannot_hold(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    monkeypatch.setattr("moray.runtime.memory.available_memory", lambda: 5 << 20)
    refused(moray("eval", "--text", text), "2.7 MiB trunk", "5.0 MiB of memory are free")


# ------------------------------------------------------------------- configuration and requests


def test_an_address_where_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    refused(moray("generate", "x", "--address", address), address, "ray start --head")
    refused(moray("generate", "x", "--address", "nonsense"), "HOST:PORT")


def test_an_unknown_configuration_key(tmp_path: Path) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text("hostz: 3\n")
    refused(moray("generate", "x", "--config", config), "hostz", "hosts")
    config.write_text("hosts: none\n")
    refused(moray("generate", "x", "--config", config), "hosts", "'none'")
    config.write_text("[1, 2\n")
    refused(moray("generate", "x", "--config", config), "engine.yaml", "YAML")
    refused(moray("generate", "x", "--device", "tpu"), "device", "cuda")


@pytest.mark.parametrize(
    ("option", "value", "fragments"),
    [
        ("--host-memory", "much", ["host_memory", "'much'", "8GiB, 500MB or 80%"]),
        ("--host-memory", "-3GiB", ["host_memory", "'-3GiB'", "above 0"]),
        ("--host-memory", "0", ["host_memory", "no memory at all"]),
        ("--host-memory", "3XB", ["host_memory", "'xb'", "GiB or TiB"]),
        ("--host-memory", "101%", ["host_memory", "at most 100%"]),
        ("--host-memory", "200KiB", ["host_memory is 200KiB", "2 slots of 192.0 KiB", "smaller recipe"]),
        ("--host-memory", "100TiB", ["host_memory is 100TiB", "is available"]),
        ("--device-memory", "1GiB", ["device_memory", "no GPU computes here"]),
        ("--context", "1", ["context", "greater than or equal to 2"]),
        ("--context", "4096", ["context is 4096", "2 to 2048 tokens"]),
    ],
)
def test_budgets_that_make_no_sense(option: str, value: str, fragments: list[str]) -> None:
    for arguments in (["generate", "x", "--hosts", "1"], ["chat", "--hosts", "1"], ["bench", "decode", "--hosts", "1"]):
        refused(moray(*arguments, "--device", "cpu", f"{option}={value}"), *fragments)


def test_a_budget_in_a_file(tmp_path: Path) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text("host_memory: 8 bananas\n")
    refused(moray("generate", "x", "--config", config), "host_memory", "'8 bananas'", "bananas", "8GiB")


@pytest.mark.ray
def test_a_prompt_longer_than_the_planned_context() -> None:
    result = moray("generate", "x = 1\n" * 40, "--context", "64")
    refused(result, "context planned for this machine's memory holds 64", "model's own 2048", "--context")


@pytest.mark.ray
@pytest.mark.long  # the same refusal, of an engine that was given no context
def test_a_prompt_longer_than_the_context() -> None:
    refused(moray("generate", "x = 1\n" * 2000), "context holds 2048", "shorten the prompt")

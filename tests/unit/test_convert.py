from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from helpers.checkpoints import FAMILIES, tiny_checkpoint
from helpers.stores import read_expert, read_trunk, state_of_store
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moray.deploy.cli import app
from moray.runtime.convert import converter, workers
from moray.runtime.convert.converter import convert
from moray.runtime.convert.journal import JOURNAL_NAME
from moray.runtime.convert.recipe import PRESETS
from moray.runtime.errors import CheckpointError, ResourceError, StoreError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.manifest import MANIFEST_NAME, Manifest
from moray.runtime.store.store import Store

SINGLE = "model.safetensors"


class Usage(NamedTuple):
    total: int
    used: int
    free: int


class Recorder:
    """A progress that remembers, and can stop the conversion."""

    def __init__(self, stop_after: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.total = self.done = self.calls = 0
        self._stop_after, self._error = stop_after, error

    def start(self, total_bytes: int) -> None:
        self.total = total_bytes

    def advance(self, num_bytes: int, what: str) -> None:
        self.done += num_bytes
        self.calls += 1
        if self.calls == self._stop_after:
            raise self._error


def checksums(manifest: Manifest) -> object:
    return manifest.trunk_checksum, {key: entry.checksum for key, entry in manifest.shards.items()}


# ---------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("family", FAMILIES)
def test_a_store_of_recipe_none_is_the_checkpoint(
    family: str, checkpoint: Callable[[str], Path], store: Callable[..., Path]
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family))
    opened = Store.open(store(family, "none"))
    state = state_of_store(opened, model)
    tied = set(model.all_tied_weights_keys)
    expected = {name: value for name, value in model.state_dict().items() if name not in tied}
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert opened.manifest.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert opened.manifest.notes == []


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "granitemoe", "jamba"])
def test_quantized_stores_are_near_the_checkpoint(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = "experts=hqq8,attention=hqq4,shared=hqq8,dense=hqq8,embeddings=hqq8"
    manifest = convert(checkpoint(family), tmp_path / "store", recipe)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family))
    state = state_of_store(Store.open(tmp_path / "store"), model)
    for name, value in state.items():
        error = (value.float() - model.state_dict()[name]).norm() / model.state_dict()[name].norm()
        assert error < (0.1 if "self_attn" in name else 0.006), name
    assert "attention" in {kind for kind, scheme in manifest.recipe.items() if scheme == "hqq4:64"}


@pytest.mark.parametrize(
    ("recipe", "encodings", "block_bytes", "error_of_experts"),
    [
        ("paper-4bit", "q4 g64 s8, q4 g48 s8", [512 + 64, 768 + 128], 0.09),
        ("paper-3bit", "q3 g64 s8, q3 g32 s8", [384 + 64, 576 + 128], 0.19),
        ("paper-2bit", "q2 g16 s8", [256 + 192, 384 + 256], 0.29),
    ],
)
def test_presets_end_to_end(
    recipe: str,
    encodings: str,
    block_bytes: list[int],
    error_of_experts: float,
    tmp_path: Path,
) -> None:
    checkpoint = tiny_checkpoint("mixtral", tmp_path / "checkpoint", num_hidden_layers=1)
    manifest = convert(checkpoint, tmp_path / "store", recipe)
    specs = [tensor.spec for tensor in manifest.layers[0].layout.tensors]
    assert [spec.block_bytes for spec in specs if spec] == block_bytes
    packed = {path: (spec.encoding, spec.group, spec.meta) for path, spec in manifest.packed_trunk.items()}
    assert {how for path, how in packed.items() if "self_attn" in path} == {("q4", 64, "u8")}
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    state = state_of_store(Store.open(tmp_path / "store"), model)
    for name, value in model.state_dict().items():
        error = (state[name].float() - value).norm() / value.norm()
        assert error < (error_of_experts if "experts" in name else 0.09), name
        assert error == 0 or "experts" in name or "self_attn" in name
    output = CliRunner().invoke(app, ["info", str(tmp_path / "store"), "--verify", "--json"])
    facts = json.loads(output.stdout)
    assert facts["recipe"].startswith(PRESETS[recipe].replace(",", ", ") + ", shared=none")
    assert facts["expert encodings"] == encodings and facts["verified"] == "every byte"


@pytest.mark.parametrize(("dtype", "encoding"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_recipe_none_keeps_the_type_of_every_tensor(tmp_path: Path, dtype: torch.dtype, encoding: str) -> None:
    path = tiny_checkpoint("mixtral", tmp_path / "checkpoint", dtype)
    tensors = load_file(path / SINGLE)
    router = "model.layers.1.block_sparse_moe.gate.weight"
    tensors[router] = tensors[router].float() + 1e-6  # checkpoints mix types: nothing may be rounded
    save_file(tensors, path / SINGLE)
    manifest = convert(path, tmp_path / "store", "none")
    opened = Store.open(tmp_path / "store")
    assert {tensor.spec.encoding for tensor in manifest.layers[0].layout.tensors if tensor.spec} == {encoding}
    assert torch.equal(read_trunk(opened)["model.layers.1.mlp.gate.weight"], tensors[router])
    down = tensors["model.layers.2.block_sparse_moe.experts.3.w2.weight"]
    assert torch.equal(read_expert(opened, ExpertKey(2, 3))["down_proj"], down)


def test_saved_buffers_and_biases_are_kept(store: Callable[..., Path]) -> None:
    trunk = read_trunk(Store.open(store("deepseek_v3", "none")))
    assert trunk["model.layers.1.mlp.gate.e_score_correction_bias"].abs().sum() > 0
    assert "lm_head.bias" in read_trunk(Store.open(store("phimoe")))


def test_the_trunk_is_aligned_for_the_kernels(store: Callable[..., Path]) -> None:
    opened = Store.open(store("phimoe"))
    data = opened.trunk_path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    packed = [name for name in header if name.endswith(".packed")]
    assert {name.removesuffix(".packed") for name in packed} == opened.manifest.packed_trunk.keys()
    assert all((8 + length + header[name]["data_offsets"][0]) % 64 == 0 for name in packed)
    with safe_open(opened.trunk_path, "pt") as file:
        assert file.get_tensor("model.layers.0.self_attn.q_proj.bias").shape == (64,)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "jamba", "minimax_m2"])
def test_fused_checkpoints_give_the_same_shards(family: str, store: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path / "checkpoint", fused=True)
    with safe_open(path / SINGLE, "pt") as file:
        assert any(key.endswith("experts.gate_up_proj") for key in file.keys())  # noqa: SIM118
    assert checksums(convert(path, tmp_path / "store")) == checksums(Store.open(store(family)).manifest)


def test_sharded_checkpoints_give_the_same_store(store: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path / "checkpoint", max_shard_size="300KB")
    assert len(list(path.glob("model-*.safetensors"))) > 5
    assert checksums(convert(path, tmp_path / "store")) == checksums(Store.open(store("mixtral")).manifest)


def test_odd_row_lengths_keep_16_bits_and_leave_a_note(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path / "checkpoint", intermediate_size=72)
    manifest = convert(path, tmp_path / "store", "experts=hqq4:64")
    assert manifest.layers[0].layout["down_proj"].spec.group == 24  # type: ignore[union-attr]
    manifest = convert(path, tmp_path / "other", "experts=hqq3")
    assert manifest.layers[0].layout["down_proj"].spec.encoding == "bf16"  # type: ignore[union-attr]
    assert any("down_proj" in note and "bf16" in note for note in manifest.notes)


def test_tensors_the_model_does_not_use_are_noted(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path / "checkpoint")
    tensors = load_file(path / SINGLE)
    tensors |= {f"model.layers.{i}.extra.weight": torch.zeros(3) for i in range(3)}
    save_file(tensors, path / SINGLE)
    manifest = convert(path, tmp_path / "store", "none")
    assert manifest.notes == ["not used by the model: model.layers.*.extra.weight (3 tensors)"]


def test_a_tied_head_is_stored_once_whatever_its_name(tmp_path: Path) -> None:
    path = tiny_checkpoint("granitemoe", tmp_path / "checkpoint")
    tensors = load_file(path / SINGLE)
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": embedding}, path / SINGLE)
    convert(path, tmp_path / "store", "none")
    trunk = read_trunk(Store.open(tmp_path / "store"))
    assert torch.equal(trunk["model.embed_tokens.weight"], embedding) and "lm_head.weight" not in trunk


def test_the_checkpoints_own_files_are_copied(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path / "checkpoint")
    copied = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt"]
    for name in copied:
        (path / name).write_text(name)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("x")
    (path / "README.md").write_text("not needed")
    convert(path, tmp_path / "store")
    for name in [*copied, "config.json", "generation_config.json", "additional_chat_templates/tools.jinja"]:
        assert (tmp_path / "store" / name).read_bytes() == (path / name).read_bytes()
    assert not (tmp_path / "store" / "README.md").exists()


def test_progress_adds_up(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    recorder = Recorder()
    manifest = convert(checkpoint("mixtral"), tmp_path / "store", progress=recorder)
    assert recorder.done == recorder.total > manifest.expert_bytes


# --------------------------------------------------------------------------------------- stopping


def test_an_interrupted_conversion_continues(
    checkpoint: Callable[[str], Path], store: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint("mixtral"), target, progress=Recorder(stop_after=30))
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(target)
    made: list[str] = []
    make = workers.Workshop.make

    def counting(self: workers.Workshop, piece: Any) -> int:
        made.append(piece.name)
        return make(self, piece)

    monkeypatch.setattr(workers.Workshop, "make", counting)
    manifest = convert(checkpoint("mixtral"), target)
    assert checksums(manifest) == checksums(Store.open(store("mixtral")).manifest)
    total = len(manifest.shards) + 14 + 10  # packed and other tensors of the trunk
    assert len(made) == total - 30
    assert not (target / JOURNAL_NAME).exists() and not list(target.glob("*.partial"))


def test_a_kept_shard_is_checked_before_it_is_believed(
    checkpoint: Callable[[str], Path], store: Callable[..., Path], tmp_path: Path
) -> None:
    target = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint("mixtral"), target, progress=Recorder(stop_after=40))
    with (target / "experts-00000.bin").open("r+b") as file:
        file.seek(9000)
        file.write(b"lost")
    assert checksums(convert(checkpoint("mixtral"), target)) == checksums(Store.open(store("mixtral")).manifest)


@pytest.mark.parametrize(
    "torn", [b'0123456789abcdef {"piece', b"\n\n", b"\x00" * 50, b'0000000000000000 {"piece": 3}\n']
)
def test_a_torn_journal_is_cut_back(
    checkpoint: Callable[[str], Path], store: Callable[..., Path], tmp_path: Path, torn: bytes
) -> None:
    target = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint("mixtral"), target, progress=Recorder(stop_after=20))
    with (target / JOURNAL_NAME).open("ab") as file:
        file.write(torn)
    assert checksums(convert(checkpoint("mixtral"), target)) == checksums(Store.open(store("mixtral")).manifest)


def test_a_stop_just_before_the_manifest_is_no_loss(
    checkpoint: Callable[[str], Path], store: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(converter, "make_receipt", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(checkpoint("mixtral"), target)
    assert not (target / MANIFEST_NAME).exists() and (target / JOURNAL_NAME).exists()
    monkeypatch.setattr(workers.Workshop, "make", stop)  # nothing is made again
    assert checksums(convert(checkpoint("mixtral"), target)) == checksums(Store.open(store("mixtral")).manifest)


@pytest.mark.parametrize("change", ["recipe", "checkpoint"])
def test_another_conversion_does_not_continue_this_one(tmp_path: Path, change: str) -> None:
    path = tiny_checkpoint("mixtral", tmp_path / "checkpoint")
    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "store", progress=Recorder(stop_after=20))
    if change == "checkpoint":
        tiny_checkpoint("mixtral", path, seed=1)
    with pytest.raises(StoreError, match=r"another checkpoint or recipe.*delete"):
        convert(path, tmp_path / "store", "hqq8" if change == "recipe" else None)


def test_two_conversions_do_not_share_a_directory(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    class Second(Recorder):
        def advance(self, num_bytes: int, what: str) -> None:
            with pytest.raises(StoreError, match="another conversion"):
                convert(checkpoint("mixtral"), tmp_path / "store")
            super().advance(num_bytes, what)

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint("mixtral"), tmp_path / "store", progress=Second(stop_after=1))


def run_conversion(path: Path, target: Path, num_workers: int) -> subprocess.CompletedProcess[str]:
    """Convert in a process that is killed after 20 pieces; its workers' process ids are its output."""
    script = textwrap.dedent(f"""
        import multiprocessing, os, signal
        from moray.runtime.convert.converter import convert

        class Killer:
            calls = 0
            def start(self, total_bytes): pass
            def advance(self, num_bytes, what):
                self.calls += 1
                if self.calls == 20:
                    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)

        if __name__ == "__main__":
            convert({str(path)!r}, {str(target)!r}, workers={num_workers}, progress=Killer())
    """)
    file = target.parent / "script.py"
    file.write_text(script)
    return subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_killed_conversion_continues(
    checkpoint: Callable[[str], Path], store: Callable[..., Path], tmp_path: Path, num_workers: int
) -> None:
    target = tmp_path / "store"
    result = run_conversion(checkpoint("mixtral"), target, num_workers)
    assert result.returncode == -signal.SIGKILL, result.stderr
    children = [int(pid) for pid in result.stdout.split()]
    assert len(children) == (num_workers if num_workers > 1 else 0)
    wait_until_gone(children)
    assert len((target / JOURNAL_NAME).read_bytes().splitlines()) == 21
    assert checksums(convert(checkpoint("mixtral"), target)) == checksums(Store.open(store("mixtral")).manifest)


def wait_until_gone(pids: list[int]) -> None:
    """Workers die with their parent; the test's own timeout is the limit."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        select.select([descriptor], [], [])
        os.close(descriptor)


# ----------------------------------------------------------------------------------------- limits


def test_a_small_disk_is_refused_up_front(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 0, 10**6))
    with pytest.raises(ResourceError, match=r"needs [\d.]+ .iB .* 976\.6 KiB are free"):
        convert(checkpoint("mixtral"), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_disk_that_fills_up_says_so_and_can_be_resumed(
    checkpoint: Callable[[str], Path], store: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = 0
    pwrite = os.pwrite

    def full(*arguments: Any) -> int:
        nonlocal writes
        writes += 1
        if writes > 25:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ResourceError, match=r"full .* [\d.]+ .i?B more are needed, [\d.]+ .i?B are free.*again"):
            convert(checkpoint("mixtral"), tmp_path / "store")
    manifest = convert(checkpoint("mixtral"), tmp_path / "store")
    assert checksums(manifest) == checksums(Store.open(store("mixtral")).manifest)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["model.layers.1.block_sparse_moe.experts.3.w1.weight", "model.norm.weight"])
@pytest.mark.parametrize("recipe", ["none", "hqq4"])
def test_values_that_are_no_numbers_name_their_tensor(tmp_path: Path, value: float, key: str, recipe: str) -> None:
    path = tiny_checkpoint("mixtral", tmp_path / "checkpoint")
    tensors = load_file(path / SINGLE)
    tensors[key].view(-1)[5] = value
    save_file(tensors, path / SINGLE)
    with pytest.raises(CheckpointError, match=f"{key}.* NaN or infinite"):
        convert(path, tmp_path / "store", recipe)


@pytest.mark.parametrize("recipe", ["hqq4", "paper-4bit"])
def test_weights_too_large_name_their_tensor(tmp_path: Path, recipe: str) -> None:
    path = tiny_checkpoint("mixtral", tmp_path / "checkpoint")
    tensors = load_file(path / SINGLE)
    key = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors[key] *= 1e6
    save_file(tensors, path / SINGLE)
    with pytest.raises(CheckpointError, match=f"{key} .*too large for q4"):
        convert(path, tmp_path / "store", recipe)

"""Stores for life: older formats, verifying, repairing, repacking, comparing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from helpers.checkpoints import tiny_checkpoint
from typer.testing import CliRunner

from moray.deploy.cli import app
from moray.deploy.config import demo_store
from moray.runtime.convert import workers
from moray.runtime.convert.converter import convert
from moray.runtime.errors import StoreError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.inspection import inspect, read_manifest
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME, Manifest
from moray.runtime.store.migrations import FORMAT_VERSION
from moray.runtime.store.receipt import RECEIPT_NAME, read_receipt
from moray.runtime.store.store import Store

KEY = ExpertKey(1, 5)


@pytest.fixture
def path(store: Callable[..., Path], tmp_path: Path) -> Path:
    """A store of our own to damage."""
    return Path(shutil.copytree(store("mixtral"), tmp_path / "store"))


def moray(*arguments: object, code: int = 0) -> str:
    """What the command prints; exit status 2 comes with one line of error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def older(path: Path) -> Path:
    """Make a store one of format 1: versions among the source, no receipt."""
    document = msgpack.unpackb((path / MANIFEST_NAME).read_bytes())
    document |= {"format": 1, "source": document["source"] | document.pop("versions")}
    (path / MANIFEST_NAME).write_bytes(msgpack.packb(document))
    (path / RECEIPT_NAME).unlink()
    return path


def damage(path: Path, key: ExpertKey = KEY) -> None:
    entry = read_manifest(path).shards[key]
    with (path / entry.file).open("r+b") as stream:
        stream.seek(entry.offset + 5000)
        stream.write(b"damage")


def checksums(manifest: Manifest) -> object:
    return manifest.trunk_checksum, {key: entry.checksum for key, entry in manifest.shards.items()}


def damaged(path: Path) -> list[str]:
    return [part.name for part in inspect(path, read_manifest(path)) if part.reason]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the pieces that are made from now on."""
    labels: list[str] = []
    make = workers.Workshop.make

    def counting(self: workers.Workshop, piece: Any) -> int:
        labels.append(piece.label)
        return make(self, piece)

    monkeypatch.setattr(workers.Workshop, "make", counting)
    return labels


# ---------------------------------------------------------------------------------------- formats


def test_a_store_of_the_earlier_format_opens_as_it_is(path: Path) -> None:
    new = Store.open(path)
    with Store.open(older(path)) as old:
        assert old.manifest == new.manifest and old.fingerprint == new.fingerprint
        assert len(list(old.verify())) == 25


def test_repack_brings_a_store_to_the_present_format(path: Path) -> None:
    manifest = Store.open(path).manifest
    assert "format 1, `moray store repack" in moray("store", "verify", older(path))
    assert "format 1 is format 2 now" in moray("store", "repack", path).replace("\n", " ")
    assert msgpack.unpackb((path / MANIFEST_NAME).read_bytes())["format"] == FORMAT_VERSION == 2
    assert Store.open(path).manifest == manifest
    receipt = read_receipt(path)
    assert receipt is not None and receipt.versions["transformers"] == manifest.versions["transformers"]
    assert "nothing to do" in moray("store", "repack", path)
    assert "are whole" in moray("store", "verify", path)


def test_the_embedded_store_is_of_the_earlier_format_and_whole() -> None:
    assert msgpack.unpackb((demo_store() / MANIFEST_NAME).read_bytes())["format"] == 1
    assert damaged(demo_store()) == []


def test_a_format_never_seen_is_refused(path: Path) -> None:
    document = msgpack.unpackb((path / MANIFEST_NAME).read_bytes())
    for version in (0, FORMAT_VERSION + 1, "2", None):
        (path / MANIFEST_NAME).write_bytes(msgpack.packb(document | {"format": version}))
        assert f"has store format {version!r}" in moray("store", "verify", path, code=2)


def test_repack_drops_what_an_unfinished_conversion_left(path: Path) -> None:
    (path / "download").mkdir()
    for name in ("download/model.safetensors.part", "convert.journal", "trunk.safetensors.partial"):
        (path / name).write_bytes(b"x")
    moray("store", "repack", path)
    assert not any((path / name).exists() for name in ("download", "convert.journal", "trunk.safetensors.partial"))


# ----------------------------------------------------------------------------------------- verify


def test_verify_names_every_damaged_part_and_what_repairs_it(path: Path) -> None:
    assert "all 28 parts are whole" in moray("store", "verify", path)
    damage(path)
    damage(path, ExpertKey(2, 0))
    (path / "config.json").write_text("{}")
    output = " ".join(moray("store", "verify", path, code=2).split())
    entry = read_manifest(path).shards[KEY]
    assert f"expert 5 of MoE layer 1 ({entry.file}, offset {entry.offset}): its checksum fails" in output
    assert "expert 0 of MoE layer 2" in output and "config.json: it is not the file" in output
    assert "2 of 24 experts and 1 other parts are damaged" in output
    assert "moray convert PATH/TO/mixtral0" in output and "--recipe experts=hqq4:64" in output
    facts = json.loads(moray("store", "verify", path, "--json", code=2).partition("\nerror")[0])
    assert len(facts["damaged"]) == 3


def test_verify_looks_at_stores_that_do_not_open(path: Path) -> None:
    (path / "experts-00002.bin").unlink()
    with (path / TRUNK_NAME).open("r+b") as stream:
        stream.truncate(1000)
    output = " ".join(moray("store", "verify", path, code=2).split())
    assert "8 of 24 experts and 1 other parts" in output and "it has 1000 bytes" in output


# ------------------------------------------------------------------------------------- completing


def test_only_damaged_experts_are_made_again(path: Path, checkpoint: Callable[[str], Path], made: list[str]) -> None:
    before = (path / MANIFEST_NAME).read_bytes()
    damage(path)
    (path / "config.json").unlink()
    convert(checkpoint("mixtral"), path)
    assert made == ["expert 5 of MoE layer 1"]
    assert damaged(path) == [] and (path / MANIFEST_NAME).read_bytes() == before


def test_a_store_that_was_copied_in_part_is_completed(
    path: Path, checkpoint: Callable[[str], Path], made: list[str]
) -> None:
    manifest = Store.open(path).manifest
    for name in (TRUNK_NAME, "experts-00001.bin", "config.json"):
        (path / name).unlink()
    convert(checkpoint("mixtral"), path)
    assert len(made) == 8 + 24  # a layer, and the trunk's tensors
    assert damaged(path) == [] and Store.open(path).manifest == manifest


def test_a_whole_store_is_only_verified(path: Path, checkpoint: Callable[[str], Path], made: list[str]) -> None:
    moved = path.rename(path.with_name("moved"))
    convert(checkpoint("mixtral"), moved)
    assert made == [] and damaged(moved) == []


def test_an_older_store_is_completed_too(path: Path, checkpoint: Callable[[str], Path], made: list[str]) -> None:
    damage(older(path))
    convert(checkpoint("mixtral"), path)
    assert made == ["expert 0 of MoE layer 0", "expert 5 of MoE layer 1"]  # the first is the proof of the source
    assert damaged(path) == [] and read_receipt(path) is not None


@pytest.mark.parametrize("state", ["whole", "damaged", "older"])
def test_a_store_is_not_completed_from_another_checkpoint(path: Path, tmp_path: Path, state: str) -> None:
    other = tiny_checkpoint("mixtral", tmp_path / "other", seed=1)
    experts = {file.name: file.read_bytes() for file in path.glob("experts-*")}
    if state == "damaged":
        damage(path)
        experts = {file.name: file.read_bytes() for file in path.glob("experts-*")}
    elif state == "older":
        older(path)
    with pytest.raises(StoreError, match=r"other bytes than|another model\.safetensors"):
        convert(other, path)
    assert {file.name: file.read_bytes() for file in path.glob("experts-*")} == experts


def test_a_completion_that_was_stopped_is_no_store_and_continues(
    path: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> int:
        raise KeyboardInterrupt

    damage(path)
    with monkeypatch.context() as patch:
        patch.setattr(workers.Workshop, "make", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(checkpoint("mixtral"), path)
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(path)
    convert(checkpoint("mixtral"), path)
    assert damaged(path) == []


def test_shards_without_a_manifest_are_not_taken(path: Path, checkpoint: Callable[[str], Path]) -> None:
    (path / MANIFEST_NAME).unlink()
    with pytest.raises(StoreError, match=r"without its manifest\.msgpack; copy that"):
        convert(checkpoint("mixtral"), path)


# ----------------------------------------------------------------------------------------- repack


@pytest.mark.parametrize(("file_size", "num_files"), [(None, 3), ("1kB", 24), ("100kB", 4), ("1GiB", 1)])
def test_repacked_shards_lie_in_other_files(
    path: Path, checkpoint: Callable[[str], Path], tmp_path: Path, file_size: str | None, num_files: int
) -> None:
    target = tmp_path / "repacked"
    moray("store", "repack", path, target, *(["--file-size", file_size] if file_size else []))
    with Store.open(path) as a, Store.open(target) as b:
        assert checksums(a.manifest) == checksums(b.manifest)
        if file_size != "100kB":
            assert len(list(target.glob("experts-*"))) == num_files
        else:
            assert all(file.stat().st_size <= 100_000 for file in target.glob("experts-*"))
        assert len(list(b.verify())) == 25 and all(e.offset % 4096 == 0 for e in b.manifest.shards.values())
    assert damaged(target) == []
    damage(target)
    convert(checkpoint("mixtral"), target)
    assert damaged(target) == []


def test_repack_refuses_what_is_damaged_or_in_the_way(path: Path, tmp_path: Path) -> None:
    assert "overlap" in moray("store", "repack", path, path / "inside", code=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "not an empty" in moray("store", "repack", path, tmp_path / "full", code=2)
    damage(path)
    assert "fails its checksum" in " ".join(moray("store", "repack", path, tmp_path / "new", code=2).split())
    assert not (tmp_path / "new" / MANIFEST_NAME).exists()


# ------------------------------------------------------------------------------------------- diff


def test_stores_of_one_checkpoint_differ_by_their_recipe(store: Callable[..., Path], path: Path) -> None:
    assert "the weights are the same" in moray("store", "diff", store("mixtral"), path)
    exact = store("mixtral", "none")
    output = moray("store", "diff", exact, path, "--json", code=1)
    facts = json.loads(output)
    assert facts["facts"]["recipe, experts"] == ["none", "hqq4:64"]
    errors = {name: entry["error"] for name, entry in facts["tensors"].items()}
    assert 0.02 < errors["model.layers.*.mlp.experts.*.down_proj"] < 0.2
    assert 0.02 < errors["model.layers.*.self_attn.q_proj"] < 0.2
    assert 0.002 < errors["lm_head"] < 0.01 and errors["model.norm"] == 0


def test_the_error_is_of_what_changed(store: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    changed = tiny_checkpoint("mixtral", tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.5.w2.weight"] *= 1.5
    save_file(tensors, changed / "model.safetensors")
    convert(changed, tmp_path / "store", "none")
    output = moray("store", "diff", store("mixtral", "none"), tmp_path / "store", "--json", code=1)
    facts = json.loads(output)
    assert facts["parts"] == {"all": 25, "same": 24}
    entry = facts["tensors"]["model.layers.*.mlp.experts.*.down_proj"]
    assert entry["error"] == pytest.approx(0.5, rel=1e-6) and entry["different"] == entry["tensors"] == 1
    assert "1 of 1" in moray("store", "diff", store("mixtral", "none"), tmp_path / "store", code=1)


def test_other_architectures_are_not_compared(store: Callable[..., Path]) -> None:
    assert "different architectures" in " ".join(
        moray("store", "diff", store("mixtral"), store("qwen3_moe"), code=2).split()
    )

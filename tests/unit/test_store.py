from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from moray.runtime.errors import CorruptShardError, StoreError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME, decode_manifest
from moray.runtime.store.migrations import FORMAT_VERSION
from moray.runtime.store.store import Store

KEY = ExpertKey(1, 5)


@pytest.fixture
def path(store: Callable[..., Path], tmp_path: Path) -> Path:
    """A store of our own to damage."""
    return Path(shutil.copytree(store("mixtral"), tmp_path / "store"))


def edit_manifest(path: Path, **changes: object) -> None:
    file = path / MANIFEST_NAME
    file.write_bytes(msgpack.packb(msgpack.unpackb(file.read_bytes()) | changes))


def flip_bit(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 4
    file.write_bytes(data)


def test_a_manifest_survives_encoding(path: Path) -> None:
    manifest = Store.open(path).manifest
    assert decode_manifest(manifest.encode(), "here") == manifest
    assert len(manifest.shards) == 3 * 8 and manifest.slot_bytes % 4096 == 0


def test_a_whole_store_verifies(path: Path) -> None:
    with Store.open(path) as store:
        assert list(store.verify()) == [*store.manifest.shards, TRUNK_NAME]


def test_the_fingerprint_is_of_the_content(path: Path) -> None:
    store = Store.open(path)
    later = Store(path, replace(store.manifest, source={"converted": "later"}))
    other = Store(path, replace(store.manifest, trunk_checksum=0))
    assert later.fingerprint == store.fingerprint != other.fingerprint


def test_a_flipped_bit_in_a_shard_names_file_and_offset(path: Path) -> None:
    entry = Store.open(path).manifest.shards[KEY]
    flip_bit(path / entry.file, entry.offset + entry.num_bytes // 2)
    store = Store.open(path)
    with pytest.raises(CorruptShardError, match=rf"{entry.file}.* offset {entry.offset} "):
        store.read_shard(KEY)
    store.read_shard(ExpertKey(1, 4))
    with pytest.raises(CorruptShardError):
        list(store.verify())


def test_a_flipped_bit_in_the_trunk_is_found(path: Path) -> None:
    flip_bit(path / TRUNK_NAME, 5000)
    with pytest.raises(StoreError, match=TRUNK_NAME):
        list(Store.open(path).verify())


def test_an_unfinished_store_says_how_to_finish(path: Path) -> None:
    (path / MANIFEST_NAME).unlink()
    with pytest.raises(StoreError, match=r"unfinished.*moray convert"):
        Store.open(path)


def test_a_checkpoint_is_not_a_store(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(StoreError, match="convert it first"):
        Store.open(checkpoint("mixtral"))


@pytest.mark.parametrize("name", ["experts-00001.bin", TRUNK_NAME])
def test_a_missing_file_is_named(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(StoreError, match=f"{name} is missing"):
        Store.open(path)


@pytest.mark.parametrize("name", ["experts-00001.bin", TRUNK_NAME])
def test_a_short_file_is_named(path: Path, name: str) -> None:
    with (path / name).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(StoreError, match=f"{name} has 1000 bytes, expected"):
        Store.open(path)


def test_a_file_that_shrinks_later_is_named(path: Path) -> None:
    store = Store.open(path)
    with (path / "experts-00001.bin").open("r+b") as file:
        file.truncate(store.manifest.shards[KEY].offset + 10)
    with pytest.raises(StoreError, match=r"experts-00001\.bin ends at"):
        store.read_shard(KEY)


def test_a_newer_format_asks_for_an_upgrade(path: Path) -> None:
    edit_manifest(path, format=FORMAT_VERSION + 1)
    with pytest.raises(StoreError, match="upgrade moray"):
        Store.open(path)


def test_another_layout_asks_to_convert_again(path: Path) -> None:
    edit_manifest(path, layout="rows8-v0")
    with pytest.raises(StoreError, match=r"rows8-v0.*convert again"):
        Store.open(path)


def test_metas_are_named_only_where_they_are_not_float16(path: Path, store: Callable[..., Path]) -> None:
    assert b"meta" not in (path / MANIFEST_NAME).read_bytes()  # readable by what knows no other
    manifest = Store.open(store("mixtral", "paper-3bit")).manifest
    entries = [t for layout in msgpack.unpackb(manifest.encode())["layouts"] for t in layout["tensors"]]
    assert [entry["meta"] for entry in entries] == ["u8", "u8"]
    assert decode_manifest(manifest.encode(), "here") == manifest


def test_an_unknown_meta_is_named(path: Path) -> None:
    layouts = msgpack.unpackb((path / MANIFEST_NAME).read_bytes())["layouts"]
    layouts[0]["tensors"][0]["meta"] = "u4"
    edit_manifest(path, layouts=layouts)
    with pytest.raises(StoreError, match="unknown meta 'u4', expected one of f16, u8"):
        Store.open(path)


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"hello", msgpack.packb({"format": FORMAT_VERSION}), msgpack.packb([1])]
)
def test_other_bytes_are_not_a_manifest(path: Path, data: bytes) -> None:
    (path / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(StoreError, match=MANIFEST_NAME):
        Store.open(path)


@pytest.mark.parametrize("changes", [{"shards": []}, {"layers": [{"module": "x"}]}, {"trunk": None}, {"layouts": [1]}])
def test_a_damaged_manifest_is_refused(path: Path, changes: dict[str, object]) -> None:
    edit_manifest(path, **changes)
    with pytest.raises(StoreError, match="damaged"):
        Store.open(path)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a directory"):
        Store.open(tmp_path / "nowhere")

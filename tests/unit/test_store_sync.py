"""Copying stores, whole and in parts: whatever happens, what is there is right, and a rerun goes on."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack
import pytest
from helpers.partial import damage, partial_copy
from helpers.processes import child, read_line, start_python
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moray.cluster.keys import KeyPair
from moray.cluster.peers import RemoteStore
from moray.cluster.store_server import serving_store, store_address
from moray.deploy.cli import app
from moray.runtime.errors import CorruptShardError, HostLostError, ResourceError, StoreError
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.manifest import MANIFEST_NAME, TRUNK_NAME, Manifest
from moray.runtime.store.presence import PRESENT_NAME, keys_of, read_presence, runs_of
from moray.runtime.store.shelf import Shelf
from moray.runtime.store.store import Store
from moray.runtime.store.sync import SyncPlan, sync_store

pytestmark = pytest.mark.timeout(180)  # what hangs fails

KEY = ExpertKey(4, 3)

# Syncs, and says which parts are written; waits for the end of its input after some of them.
SYNC = """
import resource, sys
from pathlib import Path
from moray.cluster.keys import read_keys
from moray.cluster.peers import RemoteStore
from moray.cluster.store_server import store_address
from moray.runtime.store import sync
source, store, keys, file_bytes, commit_bytes, hold_after = sys.argv[1:]
sync._COMMIT_BYTES = int(commit_bytes)
if int(file_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_bytes), -1))
class Told:
    def start(self, total_bytes, what):
        self.num_parts = 0 if what == "bringing" else float("-inf")
        print("start", what, flush=True)
    def advance(self, num_bytes, what):
        print(what, flush=True)
        self.num_parts += 1
        if self.num_parts == int(hold_after):
            sys.stdin.read()
pair = read_keys(Path(keys))
try:
    sync.sync_store(RemoteStore(store_address(source, pair), pair), Path(store), Told())
except Exception as error:
    print(type(error).__name__, error, flush=True)
print("end", flush=True)
sys.stdin.read()
"""


class Silent:
    def start(self, total_bytes: int, what: str) -> None: ...

    def advance(self, num_bytes: int, what: str) -> None: ...


def sync_from(source: Store, path: Path, wanted: Callable[[Manifest], Collection[ExpertKey]] | None = None) -> SyncPlan:
    return sync_store(Shelf(source), path, Silent(), wanted)


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def moray(*arguments: object, code: int = 0) -> str:
    """What the command prints, in one line."""
    result = CliRunner().invoke(app, ["store", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "moray.keys"
    assert "copy it to every machine" in moray("keys", path) and path.stat().st_mode & 0o777 == 0o600
    assert "choose a file that does not exist" in moray("keys", path, code=2)
    return path


@contextmanager
def served(store: Store, keys_file: Path) -> Iterator[str]:
    from moray.cluster.keys import read_keys

    with serving_store(store, "127.0.0.1:0", read_keys(keys_file)) as server:
        yield server.address.removeprefix("tcp://")


# ------------------------------------------------------------------------------------ parts and wholes


def test_parts_add_up_to_the_store(demo: Store, keys_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    with served(demo, keys_file) as address:
        options = ("--keys", keys_file)
        assert "would bring 24 experts" in moray("sync", address, path, "--part", "2/2", "--dry-run", *options)
        assert not path.exists()
        assert "24 of 48 experts are here now" in moray("sync", address, path, "--part", "2/2", *options)
        with Store.open(path) as store:
            assert len(store.present) == 24 and not store.is_whole
            assert {key.layer for key in store.present} == set(range(6))
            for key in store.present:
                assert store.read_shard(key).tobytes() == demo.read_shard(key).tobytes()
        assert "all 25 parts of the 24 of 48 experts that are here are whole" in moray("verify", path)
        facts = json.loads(moray("sync", address, path, "--layers", "0-1,5", "--json", *options))
        assert facts["experts"] == {"asked for": 24, "brought": 12, "of these damaged before": 0, "here": 36, "of": 48}
        assert "24 of 48" not in moray("verify", path)
        listed = tmp_path / "list.json"
        listed.write_text(json.dumps([[4, 3], [4, 2]]))
        with served(Store.open(path), keys_file) as partial:  # itself a source of what it has
            second = tmp_path / "second"
            assert "lacks 1 of the 2 experts asked for" in moray(
                "sync", partial, second, "--experts", listed, *options, code=2
            )
            assert "36 of 48 experts are here" in moray("sync", partial, second, *options)
        assert "it is whole" in moray("sync", demo.path, second)
        assert "it is whole now" in moray("sync", address, path, *options)
        assert contents(path) == contents(second) == contents(demo.path)
        assert "brought 0 experts and 0 files" in moray("sync", address, path, *options)


def test_a_process_serves_a_store_until_it_is_told_to_stop(demo: Store, keys_file: Path, tmp_path: Path) -> None:
    command = "-m", "moray.deploy.cli", "store", "serve", str(demo.path), "--listen", "127.0.0.1:0", "--keys"
    process = start_python(*command, str(keys_file))
    try:
        address = re.search(r"serving 48 of 48 experts of .* at (127\.0\.0\.1:\d+); copy with", read_line(process))
        assert address is not None
        assert "it is whole now" in moray("sync", address[1], tmp_path / "copy", "--keys", keys_file)
        assert contents(tmp_path / "copy") == contents(demo.path)
        process.terminate()
        assert read_line(process) == "11.9 MiB were read" and process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 7))))
@settings(max_examples=40, deadline=None)
def test_runs_name_exactly_the_shards(demo: Store, chosen: set[tuple[int, int]]) -> None:
    keys = {ExpertKey(*pair) for pair in chosen}
    assert keys_of(runs_of(keys, demo.manifest), demo.manifest) == keys


def test_what_is_damaged_or_missing_is_repaired_in_place(demo: Store, tmp_path: Path) -> None:
    path = Path(shutil.copytree(demo.path, tmp_path / "store"))
    damage(path, demo, KEY)
    (path / "experts-00001.bin").unlink()
    with (path / "experts-00002.bin").open("r+b") as file:
        file.truncate(demo.manifest.shards[ExpertKey(2, 5)].offset + 5000)
    with (path / TRUNK_NAME).open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    (path / "config.json").write_text("{}")
    (path / "notes.txt").write_text("mine")
    plan = sync_from(demo, path)
    assert len(plan.missing) == len(plan.damaged) == 1 + 8 + 3
    assert [file.name for file in plan.files] == [TRUNK_NAME, "config.json"]
    assert contents(path) == contents(demo.path) | {"notes.txt": b"mine"}  # nothing is deleted


# --------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize(
    ("is_known", "num_kills"),
    [(False, 2), (True, 2), *(pytest.param(known, 9, marks=pytest.mark.long) for known in (False, True))],
)
def test_a_copy_that_is_killed_again_and_again_becomes_the_store(
    demo: Store, keys_file: Path, tmp_path: Path, is_known: bool, num_kills: int
) -> None:
    """``is_known``: it is a store with a part of the experts from the beginning, so at every moment."""
    path, kept = tmp_path / "copy", list(demo.manifest.shards)[::5]
    if is_known:
        partial_copy(demo, path, kept)
        (path / TRUNK_NAME).unlink()
    randomly = random.Random(num_kills)
    kills = [*(randomly.randrange(1, 4) for _ in range(num_kills - 1)), 8]  # after so many parts, 5 at most of files
    assert sum(kills) + num_kills < 39  # of 39 or 53
    with served(demo, keys_file) as address:
        for num_parts in kills:
            hold_after = str(num_parts + 1)  # it may be in the next part meanwhile, but not at the end
            with child(SYNC, address, str(path), str(keys_file), "0", "500000", hold_after) as process:
                while read_line(process) != "start bringing":
                    pass
                for _ in range(num_parts):
                    read_line(process)
            assert (path / MANIFEST_NAME).exists() == is_known
            if is_known and (path / TRUNK_NAME).exists():
                with Store.open(path) as store:
                    assert set(kept) <= set(store.present) and len(list(store.verify())) == len(store.present) + 1
        with child(SYNC, address, str(path), str(keys_file), "0", "500000", "0") as process:
            num_brought = 0
            while (line := read_line(process)) != "end":
                num_brought += line.startswith("expert")
    assert num_brought < 48 - (len(kept) if is_known else 0)  # it went on where it was
    assert contents(path) == contents(demo.path)


def test_a_full_disk_is_told_and_the_rerun_goes_on(
    demo: Store, keys_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "copy"
    with served(demo, keys_file) as address:
        file_bytes = str(2 << 20)  # the trunk is larger
        with child(SYNC, address, str(path), str(keys_file), file_bytes, "500000", "0") as process:
            lines = []
            while (line := read_line(process)) != "end":
                lines.append(line)
        assert lines[-1].startswith(f"ResourceError the disk of {path} is full (File too large)")
        assert not (path / MANIFEST_NAME).exists()
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=5 << 20))
        with pytest.raises(ResourceError, match=r"needs 2\d\.\d MiB on the disk of .*copy, 5\.0 MiB are free"):
            sync_from(demo, path)
        monkeypatch.undo()
    sync_from(demo, path)
    assert contents(path) == contents(demo.path)


def test_a_write_that_fails_leaves_a_store_that_tells_the_truth(
    demo: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, left = Path(shutil.copytree(demo.path, tmp_path / "store")), os.pwrite, [3]
    for expert in range(8):
        damage(path, demo, ExpertKey(4, expert))

    def full(*arguments: object) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match=r"is full \(No space left on device\).*run the same command again"):
        sync_from(demo, path)
    monkeypatch.undo()
    with Store.open(path) as store:
        assert len(store.present) == 40 and len(list(store.verify())) == 41
    assert len(sync_from(demo, path).missing) == 5
    assert contents(path) == contents(demo.path)


# -------------------------------------------------------------------------------------------- refusals


def test_a_source_that_lies_is_named_and_makes_no_store(demo: Store, keys_file: Path, tmp_path: Path) -> None:
    lie = Path(shutil.copytree(demo.path, tmp_path / "lie"))
    damage(lie, demo, KEY)
    with Store.open(lie) as store, served(store, keys_file) as address:
        path = tmp_path / "copy"
        output = moray("sync", address, path, "--keys", keys_file, code=2)
        assert f"expert 3 of MoE layer 4 comes from tcp://{address} with another checksum" in output
        assert not (path / MANIFEST_NAME).exists()
        with (lie / TRUNK_NAME).open("r+b") as file:
            file.write(b"x")
        with pytest.raises(StoreError, match=r"trunk\.safetensors comes from .* with another checksum"):
            sync_from(store, tmp_path / "third")
    with pytest.raises(CorruptShardError):
        sync_from(Store.open(lie), path)
    sync_from(demo, path)
    assert contents(path) == contents(demo.path)


def test_who_has_not_the_keys_reads_nothing(demo: Store, keys_file: Path, tmp_path: Path) -> None:
    other = KeyPair.make()
    with served(demo, keys_file) as address:
        with pytest.raises(HostLostError, match="did not answer; is it served there, with the same keys"):
            RemoteStore(store_address(address, other), other, timeout_s=0.3)
        assert "needs --keys" in moray("sync", address, tmp_path / "copy", code=2)
    assert not (tmp_path / "copy").exists()


def test_places_that_are_no_copy_of_the_source_are_refused(demo: Store, tmp_path: Path) -> None:
    other = Path(shutil.copytree(demo.path, tmp_path / "other"))
    document = msgpack.unpackb((other / MANIFEST_NAME).read_bytes())
    (other / MANIFEST_NAME).write_bytes(msgpack.packb(document | {"family": "another"}))
    before = contents(other)
    assert "holds another store than" in moray("sync", demo.path, other, code=2)
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "letters").write_text("dear")
    assert "(it holds letters); choose another directory" in moray("sync", demo.path, foreign, code=2)
    assert "overlap" in moray("sync", demo.path, demo.path, code=2)
    assert "overlap" in moray("sync", demo.path, demo.path / "in", code=2)
    assert "is neither a directory nor HOST:PORT" in moray("sync", tmp_path / "none", tmp_path / "copy", code=2)
    for option, value, text in (
        ("--layers", "4-9", "MoE layers 0 to 5"),
        ("--part", "3/2", "expected i/n such as 1/2"),
        ("--experts", tmp_path / "none", "no JSON list"),
    ):
        assert text in moray("sync", demo.path, tmp_path / "copy", option, value, code=2)
    assert "exclude each other" in moray("sync", demo.path, other, "--layers", "1", "--part", "1/2", code=2)
    assert contents(other) == before and not (tmp_path / "copy").exists()


def test_a_list_of_shards_that_is_wrong_is_refused(demo: Store, tmp_path: Path) -> None:
    path = partial_copy(demo, tmp_path / "part", [KEY])
    good = msgpack.unpackb((path / PRESENT_NAME).read_bytes())
    assert read_presence(path, demo.manifest) == {KEY}
    wrong: list[object] = [[], {"format": 2}, good | {"store": "another"}, good | {"layers": [[]] * 5}]
    wrong += [good | {"layers": [[*runs], [], [], [], [], []]} for runs in ([0], [0, 9], [3, 1], [1, 1], ["a", "b"])]
    for document in [*(msgpack.packb(x) for x in wrong), b"", b"\xc1"]:
        (path / PRESENT_NAME).write_bytes(document)
        with pytest.raises(StoreError, match=r"present\.msgpack .*; delete it and run `moray store sync"):
            Store.open(path)

"""Conversions from a model hub, over HTTP on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.checkpoints import tiny_checkpoint
from helpers.hub import LocalHub, local_hub
from helpers.processes import start_python
from huggingface_hub import constants

from moray.runtime.convert import hub_files
from moray.runtime.convert.hub_convert import cached_store, convert_from_hub
from moray.runtime.convert.needs import Needs
from moray.runtime.convert.workspace import DOWNLOAD_FOLDER
from moray.runtime.errors import CheckpointError, HubError, MorayError, StoreError
from moray.runtime.store.manifest import Manifest
from moray.runtime.store.receipt import read_receipt
from moray.runtime.store.store import Store

NAME = "org/Tiny-MoE"
WEIGHTS = ".safetensors"
_TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"  # of the client, which reads HF_ENDPOINT when it is imported


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in ten files, with code in the repository and a file nobody needs."""
    folder = tiny_checkpoint("mixtral", tmp_path_factory.mktemp("hub") / "tiny", max_shard_size="150KB")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code from a hub has run')")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "README.md").write_text("not needed")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_tiny.Config", "AutoModelForCausalLM": "modeling_tiny.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def expected(published: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    """Checksums of the store of the same checkpoint, converted from its folder."""
    from moray.runtime.convert.converter import convert

    return checksums(convert(published, tmp_path_factory.mktemp("expected") / "store"))


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub with one repository, asked by this process, with an empty cache."""
    with local_hub() as made:
        made.add(NAME, published)
        monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.endpoint + _TEMPLATE)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
        monkeypatch.setattr(hub_files, "_LONGEST_PAUSE_S", 0.01)
        monkeypatch.setenv("HF_TOKEN", "")
        yield made


def checksums(manifest: Manifest) -> object:
    return manifest.trunk_checksum, {key: entry.checksum for key, entry in manifest.shards.items()}


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("stream", [False, True])
def test_a_hubs_model_gives_the_store_of_its_checkpoint(
    hub: LocalHub, published: Path, expected: object, tmp_path: Path, stream: bool
) -> None:
    manifest = convert_from_hub(NAME, tmp_path / "store", stream=stream)
    assert checksums(manifest) == expected
    assert manifest.source["checkpoint"] == NAME
    assert (manifest.source["revision"], manifest.source["commit"]) == ("main", "a" * 40)
    with Store.open(tmp_path / "store") as store:
        assert len(list(store.verify())) == 25
    cached = files_in(tmp_path / "hub-cache")
    assert any(name.endswith(WEIGHTS) for name in cached) != stream
    assert not (tmp_path / "store" / DOWNLOAD_FOLDER).exists()
    assert (tmp_path / "store" / "tokenizer_config.json").read_text() == "{}"


def test_code_in_a_repository_is_neither_fetched_nor_run(hub: LocalHub, tmp_path: Path) -> None:
    convert_from_hub(NAME, tmp_path / "store", "none")
    assert hub.fetched(".py") == [] and hub.fetched("README.md") == []


def test_the_receipt_names_the_commit_and_every_file(hub: LocalHub, published: Path, tmp_path: Path) -> None:
    manifest = convert_from_hub(NAME, tmp_path / "store", revision="a" * 40, stream=True)
    receipt = read_receipt(tmp_path / "store")
    assert receipt is not None and receipt.source["commit"] == "a" * 40
    weights = {path.name: hub.sha256(path) for path in published.glob("*.safetensors")}
    assert {name: entry.sha256 for name, entry in receipt.files.items()} == weights
    assert receipt.recipe == manifest.recipe and receipt.versions["transformers"]


def test_streaming_holds_no_more_than_was_announced(hub: LocalHub, published: Path, tmp_path: Path) -> None:
    target = tmp_path / "store"
    told: list[Needs] = []
    sizes: list[int] = []
    largest = max(path.stat().st_size for path in published.glob("*.safetensors"))

    class Watcher:
        def start(self, total_bytes: int) -> None:
            pass

        def advance(self, num_bytes: int, what: str) -> None:
            held = [path.stat().st_blocks * 512 for path in (target / DOWNLOAD_FOLDER).rglob("*") if path.is_file()]
            sizes.append(sum(held))

    convert_from_hub(NAME, target, stream=True, progress=Watcher(), announce=told.append)
    (needs,) = told
    room = needs.disk_bytes - needs.store_bytes
    assert largest <= room < 4 * largest  # an expert's matrices may lie in several files
    assert largest <= max(sizes) <= room + largest + 8192 * 10  # one file ahead, while the store is still to come


def test_weights_are_downloaded_once(hub: LocalHub, published: Path, tmp_path: Path) -> None:
    convert_from_hub(NAME, tmp_path / "store", stream=True)
    total = sum(path.stat().st_size for path in published.rglob("*") if path.is_file())
    headers = 10 * (1 << 20)  # of these small files, more than all of each
    assert hub.bytes_sent < 2 * total + headers


def test_a_second_conversion_uses_the_clients_cache(hub: LocalHub, tmp_path: Path) -> None:
    convert_from_hub(NAME, tmp_path / "store")
    hub.requests.clear()
    convert_from_hub(NAME, tmp_path / "other", "none")
    whole = [wanted for method, path, _, wanted in hub.requests if method == "GET" and "/content/" in path]
    assert all(wanted.startswith("bytes=0-") for wanted in whole)  # headers only


# ---------------------------------------------------------------------------------------- offline


def test_offline_the_clients_cache_is_converted(
    hub: LocalHub, expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_from_hub(NAME, tmp_path / "store")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    manifest = convert_from_hub(NAME, tmp_path / "other")
    assert checksums(manifest) == expected and manifest.source["commit"] == "a" * 40
    assert hub.requests == []


def test_offline_without_a_cache_says_so(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"not in the cache .* HF_HUB_OFFLINE is set"):
        convert_from_hub(NAME, tmp_path / "store")
    assert hub.requests == []


# ---------------------------------------------------------------------------------------- refusals


def refused(name: str, target: Path, error: type[MorayError] = HubError, revision: str | None = None) -> str:
    """The message, which must be one line without addresses or tokens, and nothing may be left."""
    with pytest.raises(error) as caught:
        convert_from_hub(name, target, revision=revision, stream=True)
    message = str(caught.value)
    assert "\n" not in message and "http" not in message.replace("HTTPS_PROXY", "") and "secret" not in message
    assert not target.exists()
    return message


def test_a_model_that_is_not_there(hub: LocalHub, tmp_path: Path) -> None:
    assert "no model org/none" in refused("org/none", tmp_path / "store")


def test_a_revision_that_is_not_there(hub: LocalHub, tmp_path: Path) -> None:
    assert "has no revision v9" in refused(NAME, tmp_path / "store", revision="v9")


@pytest.mark.parametrize("token", ["", "hf_secret_wrong"])
def test_a_gated_model_needs_an_account(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    hub.gated[NAME] = "hf_secret_right"
    monkeypatch.setenv("HF_TOKEN", token)
    assert "is gated: accept its conditions" in refused(NAME, tmp_path / "store")


def test_a_token_opens_a_gated_model(
    hub: LocalHub, expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated[NAME] = "hf_secret_right"
    monkeypatch.setenv("HF_TOKEN", "hf_secret_right")
    assert checksums(convert_from_hub(NAME, tmp_path / "store", stream=True)) == expected
    assert {token for _, path, token, _ in hub.requests if "/content/" in path} == {""}  # another host's
    for file in ("manifest.msgpack", "receipt.json"):
        assert b"secret" not in (tmp_path / "store" / file).read_bytes()


def test_a_hub_that_is_not_there(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(NAME, tmp_path / "store")


def test_a_repository_without_safetensors(hub: LocalHub, published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(published / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    hub.add("org/old", folder)
    assert "weights in pytorch_model.bin" in refused("org/old", tmp_path / "store", CheckpointError)


def test_a_repository_that_lacks_a_file(hub: LocalHub, published: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published, tmp_path / "part"))
    next(folder.glob("model-00003*")).unlink()
    hub.add("org/part", folder)
    assert "lacks model-00003" in refused("org/part", tmp_path / "store", CheckpointError)


# ---------------------------------------------------------------------------------------- failures

CONTENT = r"/content/.*model-0000[35]"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "reset", "after": 50_000},
        {"kind": "cut", "after": 70_000},
        {"kind": "503", "Retry_After": "0"},
        {"kind": "429", "Retry_After": "0"},
        {"kind": "corrupt"},
    ],
    ids=lambda fault: fault["kind"],
)
def test_failures_that_pass(
    hub: LocalHub,
    expected: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: dict[str, str],
    stream: bool,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    convert_from_hub(NAME, tmp_path / "planned", "none", stream=True)  # headers are there without a failure
    hub.fail(CONTENT, times=1 if fault["kind"] == "corrupt" else 2, **fault)  # type: ignore[arg-type]
    with hub_headers_unharmed(hub):
        manifest = convert_from_hub(NAME, tmp_path / "store", stream=stream)
    assert checksums(manifest) == expected
    assert [f.times for f in hub.faults] == [0]


class hub_headers_unharmed:
    """Faults meet only whole files: requests for headers, which come first, are let through."""

    def __init__(self, hub: LocalHub) -> None:
        self._hub = hub
        self._take = hub.take_fault

    def __enter__(self) -> None:
        seen: set[str] = set()

        def take(path: str) -> object:
            if "/content/" in path and path not in seen:
                seen.add(path)
                return None
            return self._take(path)

        self._hub.take_fault = take  # type: ignore[method-assign,assignment]

    def __exit__(self, *exc: object) -> None:
        self._hub.take_fault = self._take  # type: ignore[method-assign]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("reset", "cannot be reached.*run the same command again"),
        ("cut", "run the same command again"),
        ("404", "gone|status 404"),
        ("503", "status 503"),
        ("corrupt", "another sha256"),
    ],
)
def test_failures_that_last_are_resumed(
    hub: LocalHub,
    expected: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    message: str,
    stream: bool,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail(CONTENT, kind, times=10**6, Retry_After="0")
    target = tmp_path / "store"
    with hub_headers_unharmed(hub), pytest.raises(HubError, match=message):
        convert_from_hub(NAME, target, stream=stream)
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(target)
    hub.faults.clear()
    assert checksums(convert_from_hub(NAME, target, stream=stream)) == expected
    assert list(Store.open(target).verify())


def test_a_streamed_file_continues_where_it_was_cut(hub: LocalHub, tmp_path: Path) -> None:
    hub.fail(r"/content/.*model-00003", "cut", times=1, after=60_000)
    with hub_headers_unharmed(hub):
        convert_from_hub(NAME, tmp_path / "store", stream=True)
    ranges = [wanted for _, path, _, wanted in hub.requests if path.endswith(".safetensors") and "-00003" in path]
    continued = [wanted for wanted in ranges if wanted and not wanted.startswith("bytes=0-")]
    assert continued and all(int(wanted[6:-1]) > 50_000 for wanted in continued), ranges


def test_a_server_without_ranges_is_enough(hub: LocalHub, expected: object, tmp_path: Path) -> None:
    hub.ignore_ranges = True
    hub.fail(CONTENT, "reset", times=2, after=60_000)
    with hub_headers_unharmed(hub):
        assert checksums(convert_from_hub(NAME, tmp_path / "store", stream=True)) == expected


def test_a_model_that_changes_is_not_mixed(hub: LocalHub, published: Path, tmp_path: Path) -> None:
    hub.fail(CONTENT, "404", times=10**6)
    with hub_headers_unharmed(hub), pytest.raises(HubError):
        convert_from_hub(NAME, tmp_path / "store", stream=True)
    hub.faults.clear()
    changed = tiny_checkpoint("mixtral", tmp_path / "changed", seed=1, max_shard_size="150KB")
    hub.add(NAME, changed, commit="b" * 40)
    with pytest.raises(StoreError, match="another checkpoint"):
        convert_from_hub(NAME, tmp_path / "store", stream=True)


# ------------------------------------------------------------------------------------------- cache


def test_a_model_is_converted_once_into_the_cache(
    hub: LocalHub, expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moray.deploy.commands.registry import errors
    from moray.deploy.hub_commands import store_of_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    path = store_of_model(None, NAME, None, "hqq4", errors)
    assert path is not None and (tmp_path / "cache" / "moray" / "stores") in path.parents
    with Store.open(path) as store:
        assert checksums(store.manifest) == expected
    hub.requests.clear()
    assert store_of_model(None, NAME, None, "hqq4", errors) == path
    assert hub.requests == []
    assert store_of_model(None, NAME, None, "none", errors) != path


@pytest.mark.slow
def test_the_command_line_asks_the_mirror_of_the_environment(published: Path, expected: object, tmp_path: Path) -> None:
    environment = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN": "hf_secret", "COLUMNS": "200"}
    arguments = ["-m", "moray.deploy.cli", "convert", NAME, str(tmp_path / "store"), "--stream"]
    with local_hub() as hub:
        hub.add(NAME, published)
        hub.gated[NAME] = "hf_secret"
        online = environment | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        with start_python(*arguments, **online) as child:
            output = child.communicate()[0]
        assert child.returncode == 0 and "is complete" in output
        assert re.search(r"the conversion needs about [\d.]+ MiB of memory in 1 process and .* of disk \(store", output)
        assert checksums(Store.open(tmp_path / "store").manifest) == expected
        hub.requests.clear()
        arguments[4] = str(tmp_path / "other")
        with start_python(*arguments, **online | {"HF_HUB_OFFLINE": "1"}) as child:
            child.communicate()
        assert child.returncode == 2 and hub.requests == []


def test_an_unfinished_store_in_the_cache_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not finished"):
        cached_store(NAME, "hqq4", None, lambda path: path.mkdir(parents=True), tmp_path)


def test_different_models_never_share_a_store(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        path.mkdir(parents=True)
        (path / "manifest.msgpack").touch()

    asked = [("a/b", "x", None), ("a/b.x", "x", None), ("a/b", "x", "c"), ("a/b", "x:1", None), ("a/b", "x_1", None)]
    asked += [("a/b", "x", "c/d"), ("a/b", "x", "c_d"), ("a/b", "x", "../d"), ("a/x", "b", None)]
    stores = [cached_store(*arguments, make, tmp_path) for arguments in asked]
    assert len(set(stores)) == len(asked)
    assert all(tmp_path in path.resolve().parents for path in stores)
    assert cached_store("a/b", "x", "main", make, tmp_path) == stores[0]

"""Damaged files of every kind: an error of one line, and never a store that claims to be complete and is not.

The same properties run on some hundreds of examples by default, and on thousands with ``-m long``.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import xxhash
from helpers.checkpoints import FAMILIES, tiny_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moray.runtime.convert.checkpoint import INDEX_NAME, SINGLE_NAME
from moray.runtime.convert.converter import convert
from moray.runtime.convert.journal import JOURNAL_NAME
from moray.runtime.errors import MorayError
from moray.runtime.store.manifest import MANIFEST_NAME
from moray.runtime.store.store import Store

_TINY: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_local_experts": 2}
_TINY |= {"vocab_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
LONG = pytest.mark.long
COUNTS = [150, pytest.param(3000, marks=[LONG, pytest.mark.timeout(3000)])]

Edit = Callable[[Any], Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer, in two files."""
    return tiny_checkpoint("mixtral", tmp_path_factory.mktemp("fuzz") / "base", max_shard_size="40KB", **_TINY)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("mixtral", tmp_path_factory.mktemp("fuzz") / "single", **_TINY)


def fuzz(count: int, case: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """The default suite sees the same examples in every run."""
    run = given(case)(lambda example: check(example))
    settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count < 1000,
        suppress_health_check=list(HealthCheck),
    )(run)()


@contextmanager
def refusing_in_one_line() -> Iterator[None]:
    try:
        yield
    except MorayError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 3000
        str(error).encode()


def check_conversion(checkpoint: Path, folder: Path, **options: Any) -> None:
    """It converts to a store that verifies, or is refused and leaves none."""
    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    with refusing_in_one_line():
        convert(checkpoint, store, "none", **options)
        with Store.open(store) as opened:
            assert list(opened.verify())
        return
    assert not (store / MANIFEST_NAME).exists()


# ----------------------------------------------------------------------------------- damage

_NUMBERS = [0, 1, -1, 2, 3, 7, 64, 1 << 31, 1 << 63, 10**18, -(10**18), 10**30, 0.5, float("nan"), float("inf")]
_TEXTS = ["", ".", "..", "../x", "/etc/passwd", "a\nb", "\0", "\ud800", "é", "F32", "F8_E4M3", "I64", "auto", "llama"]
SCALARS = st.one_of(st.none(), st.booleans(), st.sampled_from(_NUMBERS), st.integers(-5, 5), st.sampled_from(_TEXTS))
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner), max_leaves=4
)


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    """One change somewhere in a document, made by choosing branches by number."""
    turns = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=6))
    what = draw(st.sampled_from(["set", "set", "set", "delete", "copy", "rename"]))
    junk = draw(JUNK)

    def edit(document: Any) -> Any:
        node, parent, at = document, None, None
        for turn in turns:
            if isinstance(node, dict) and node:
                parent, at = node, list(node)[turn % len(node)]
            elif isinstance(node, list) and node:
                parent, at = node, turn % len(node)
            else:
                break
            node = parent[at]
        if parent is None:
            return junk
        if what == "delete":
            del parent[at]
        elif what == "copy":
            parent[at] = next(iter(parent.values())) if isinstance(parent, dict) else parent[0]
        elif what == "rename" and isinstance(parent, dict):
            parent[junk if isinstance(junk, str) else "x"] = parent.pop(at)
        else:
            parent[at] = junk
        return document

    return edit


@st.composite
def byte_edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cut short, bits flipped, bytes put in or taken out."""
    what = draw(st.sampled_from(["cut", "flip", "insert", "delete", "replace"]))
    where, size, data = (
        draw(st.integers(0, 1 << 20)),
        draw(st.integers(1, 16)),
        draw(st.binary(min_size=1, max_size=16)),
    )

    def edit(content: bytes) -> bytes:
        at = where % (len(content) + 1)
        if what == "cut":
            return content[:at]
        if what == "insert":
            return content[:at] + data + content[at:]
        if what == "delete":
            return content[:at] + content[at + size :]
        if what == "flip":
            flipped = bytes(one ^ data[0] for one in content[at : at + 1])
            return content[:at] + flipped + content[at + 1 :]
        return content[:at] + data + content[at + len(data) :]

    return edit


def apply_all(changes: list[Edit], document: Any) -> Any:
    for change in changes:
        document = change(document)
    return document


SEVERAL = st.lists(edits(), min_size=1, max_size=3)


def copy_of(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


# ------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("count", COUNTS)
def test_headers(count: int, single: Path, tmp_path: Path) -> None:
    data = (single / SINGLE_NAME).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, content = json.loads(data[8 : 8 + length]), data[8 + length :]
    path = copy_of(single, tmp_path / "checkpoint")

    def check(case: tuple[list[Edit], int | None]) -> None:
        changes, claimed = case
        text = json.dumps(apply_all(changes, copy.deepcopy(header))).encode()
        size = len(text) if claimed is None else claimed
        (path / SINGLE_NAME).write_bytes(size.to_bytes(8, "little") + text + content)
        check_conversion(path, tmp_path)

    claims = st.sampled_from([None] * 5 + [0, 1, 2, 100 << 20, (1 << 64) - 1, 1 << 62])
    fuzz(count, st.tuples(SEVERAL, claims), check)


@pytest.mark.parametrize("count", COUNTS)
def test_bytes_of_a_file(count: int, single: Path, tmp_path: Path) -> None:
    data = (single / SINGLE_NAME).read_bytes()
    length = int.from_bytes(data[:8], "little") + 8
    path = copy_of(single, tmp_path / "checkpoint")

    def check(edit: Callable[[bytes], bytes]) -> None:
        (path / SINGLE_NAME).write_bytes(edit(data[:length]) + data[length:])
        check_conversion(path, tmp_path)

    fuzz(count, byte_edits(), check)


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},'
        ' "a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}',
        '{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},'
        ' "b": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]}}',
        '{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F4", "shape": [1000000000000000000], "data_offsets": [0, 9223372036854775807]}}',
        '{"a\\nb": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        "[" * 100_000,
    ],
)
def test_headers_made_to_deceive(header: str, single: Path, tmp_path: Path) -> None:
    path = copy_of(single, tmp_path / "checkpoint")
    (path / SINGLE_NAME).write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(64))
    check_conversion(path, tmp_path)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("count", COUNTS)
def test_indexes(count: int, base: Path, tmp_path: Path) -> None:
    index = json.loads((base / INDEX_NAME).read_text())
    path = copy_of(base, tmp_path / "checkpoint")

    def check(changes: list[Edit]) -> None:
        (path / INDEX_NAME).write_text(json.dumps(apply_all(changes, copy.deepcopy(index))))
        check_conversion(path, tmp_path)

    fuzz(count, SEVERAL, check)


@pytest.mark.parametrize(
    "name", ["../{}", "{absolute}", "sub/../../other/{}", ".", "", "\0", "loop.safetensors", "config.json"]
)
def test_files_outside_the_checkpoint(name: str, base: Path, tmp_path: Path) -> None:
    """Even where the file is there and right."""
    path = copy_of(base, tmp_path / "checkpoint")
    index = json.loads((path / INDEX_NAME).read_text())
    key, file = next(iter(index["weight_map"].items()))
    other = copy_of(base, tmp_path / "other") / file
    shutil.copyfile(other, tmp_path / file)
    (path / "loop.safetensors").symlink_to("loop.safetensors")
    for key, value in index["weight_map"].items():
        if value == file:
            index["weight_map"][key] = name.format(file, absolute=other)
    (path / INDEX_NAME).write_text(json.dumps(index))
    check_conversion(path, tmp_path)
    assert not (tmp_path / "store").exists()


FAMILY_COUNTS = [("mixtral", 150), *(pytest.param(family, 1000, marks=LONG) for family in FAMILIES)]


@pytest.mark.parametrize(("family", "count"), FAMILY_COUNTS)
def test_configs(family: str, count: int, single: Path, tmp_path: Path) -> None:
    source = single if family == "mixtral" else tiny_checkpoint(family, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    path = copy_of(source, tmp_path / "checkpoint")

    def check(changes: list[Edit]) -> None:
        (path / "config.json").write_text(json.dumps(apply_all(changes, copy.deepcopy(config))))
        check_conversion(path, tmp_path)

    fuzz(count, SEVERAL, check)


COUNTED = ["num_hidden_layers", "num_local_experts", "num_experts_per_tok", "hidden_size", "intermediate_size"]
COUNTED += ["vocab_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "head_dim"]


@pytest.mark.parametrize("name", COUNTED)
def test_numbers_of_a_config(name: str, single: Path, tmp_path: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    path = copy_of(single, tmp_path / "checkpoint")
    for value in (0, -1, 3, 9_999, 10**6, 10**18, 1.5, "8", [8], {}, None, True):
        (path / "config.json").write_text(json.dumps(config | {name: value}))
        check_conversion(path, tmp_path)


def test_code_of_a_checkpoint_is_not_run(single: Path, tmp_path: Path) -> None:
    path = copy_of(single, tmp_path / "checkpoint")
    config = json.loads((path / "config.json").read_text())
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (path / "config.json").write_text(
        json.dumps(
            config
            | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
        )
    )
    check_conversion(path, tmp_path)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "store").exists()


@pytest.mark.parametrize("count", COUNTS)
def test_adapters(count: int, single: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"v_proj": 3}}
    config |= {"alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True, "target_parameters": None}
    data = (adapter / "adapter_model.safetensors").read_bytes()

    def check(case: tuple[list[Edit], Callable[[bytes], bytes] | None]) -> None:
        changes, edit = case
        text = json.dumps(config if edit else apply_all(changes, copy.deepcopy(config)))
        (adapter / "adapter_config.json").write_text(text)
        (adapter / "adapter_model.safetensors").write_bytes(edit(data) if edit else data)
        check_conversion(single, tmp_path, lora=[adapter])

    fuzz(count, st.tuples(SEVERAL, st.none() | byte_edits()), check)


# ----------------------------------------------------------------------------------- stores


def check_store(path: Path) -> None:
    """It opens and verifies, or says in one line why not."""
    with refusing_in_one_line(), Store.open(path) as opened:
        manifest = opened.manifest
        assert manifest.slot_bytes and opened.fingerprint
        assert list(opened.verify())


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=LONG)])
def test_manifests(count: int, single: Path, tmp_path: Path) -> None:
    convert(single, tmp_path / "store", "none")
    file = tmp_path / "store" / MANIFEST_NAME
    document = msgpack.unpackb(file.read_bytes())

    def check(changes: list[Edit]) -> None:
        try:
            data = msgpack.packb(apply_all(changes, copy.deepcopy(document)))
        except (ValueError, OverflowError):  # a surrogate or 10**30, which msgpack does not have
            return
        file.write_bytes(data)
        check_store(file.parent)

    fuzz(count, SEVERAL, check)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=LONG)])
def test_bytes_of_a_manifest(count: int, single: Path, tmp_path: Path) -> None:
    convert(single, tmp_path / "store", "none")
    file = tmp_path / "store" / MANIFEST_NAME
    data = file.read_bytes()

    def check(edit: Callable[[bytes], bytes]) -> None:
        file.write_bytes(edit(data))
        check_store(file.parent)

    fuzz(count, byte_edits() | st.binary(max_size=64).map(lambda data: lambda _: data), check)


@pytest.mark.parametrize("name", ["../outside.bin", "{absolute}", "sub/../../outside.bin"])
def test_shards_outside_the_store(name: str, single: Path, tmp_path: Path) -> None:
    convert(single, tmp_path / "store", "none")
    file = tmp_path / "store" / MANIFEST_NAME
    document = msgpack.unpackb(file.read_bytes())
    shutil.move(tmp_path / "store" / document["shards"][0][2], tmp_path / "outside.bin")
    for shard in document["shards"]:
        shard[2] = name.format(absolute=tmp_path / "outside.bin")
    file.write_bytes(msgpack.packb(document))
    with pytest.raises(MorayError, match="damaged"):
        Store.open(tmp_path / "store")


@pytest.mark.parametrize("count", COUNTS)
def test_journals(count: int, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unfinished store with a damaged journal is refused, or becomes the store that it would have become."""
    complete = convert(single, tmp_path / "complete", "none")
    with monkeypatch.context() as patched:
        patched.setattr("moray.runtime.convert.converter._finish_files", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(single, tmp_path / "unfinished", "none")
    journal = (tmp_path / "unfinished" / JOURNAL_NAME).read_bytes()
    lines = [json.loads(line.split(b" ", 1)[1]) for line in journal.splitlines()]
    store = tmp_path / "store"

    def check(case: tuple[list[Edit], Callable[[bytes], bytes] | None]) -> None:
        changes, edit = case
        copy_of(tmp_path / "unfinished", store)
        records = apply_all(changes, copy.deepcopy(lines)) if edit is None else lines
        texts = [json.dumps(record).encode() for record in (records if isinstance(records, list) else [records])]
        data = b"".join(b"%016x %s\n" % (xxhash.xxh3_64_intdigest(text), text) for text in texts)
        (store / JOURNAL_NAME).write_bytes(edit(data) if edit else data)
        with refusing_in_one_line():
            assert convert(single, store, "none").shards == complete.shards
            with Store.open(store) as opened:
                assert list(opened.verify())
            return
        assert not (store / MANIFEST_NAME).exists()

    fuzz(count, st.tuples(SEVERAL, st.none() | byte_edits()), check)

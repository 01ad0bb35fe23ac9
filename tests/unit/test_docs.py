"""What the documents say that code can check."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml

from moray.deploy.cli import app
from moray.deploy.config import EngineConfig, make_config
from moray.runtime.convert.recipe import Recipe
from moray.runtime.layout.packed import Encoding, PackedSpec, Quantized, pack_quantized

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/architecture.md", "docs/format.md")
FOLDERS = ("actors", "cluster", "deploy", "runtime")
ENGINE_CONFIGS = sorted((ROOT / "configs" / "engine").glob("*.yaml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def rows(name: str, pattern: str) -> list[Any]:
    """The group, or the tuple of groups, of every line of a document that is a table row like ``pattern``."""
    found = re.findall(rf"^\| {pattern} \|", read(name), re.MULTILINE)
    assert found, f"{name} has no row like {pattern}"
    return found


# ------------------------------------------------------------------------------- architecture


def test_architecture_lists_every_module_once_and_in_folder_order() -> None:
    files = (file.relative_to(ROOT) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    modules = {str(file) for file in files if file.name != "__init__.py" or len(ast.parse(read(str(file))).body) > 1}
    listed = rows("docs/architecture.md", r"`([a-z_/]+\.py)` \| .+")
    assert set(listed) == modules
    order = {"runtime": 0, "cluster": 1, "actors": 2, "deploy": 3}
    assert listed == sorted(listed, key=lambda m: (order[m.partition("/")[0]], m.count("/") > 1, m))


def test_documents_name_no_file_that_is_not_there() -> None:
    for document in DOCUMENTS:
        for name in re.findall(rf"`((?:{'|'.join(FOLDERS)}|docs|configs|tests)/[\w/.-]+)`", read(document)):
            assert (ROOT / name).exists(), f"{document} names {name}"


# ------------------------------------------------------------------------------------- format


def changed_bits(spec: PackedSpec, row: int, column: int) -> dict[int, int]:
    """Byte -> mask of the bits of a packed matrix that hold one code."""
    codes = np.zeros((spec.rows, spec.columns), np.uint8)
    grid = np.ones((spec.rows, spec.num_groups), np.float32), np.zeros((spec.rows, spec.num_groups), np.float32)
    empty = pack_quantized(Quantized(codes, *grid), spec)
    codes[row, column] = (1 << spec.bits) - 1
    filled = pack_quantized(Quantized(codes, *grid), spec)
    return {int(byte): int(filled[byte]) for byte in np.flatnonzero(filled != empty)}


@pytest.mark.parametrize("encoding", ["q8", "q4", "q3", "q2"])
def test_the_worked_example_of_the_format(encoding: Encoding) -> None:
    spec = PackedSpec(896, 256, encoding, 64)
    (row,) = rows("docs/format.md", rf"`{encoding}` \| ([\d and]+) \| ([\d and-]+) \| (\d+) \| (\d+) \| (\d+)")
    bytes_, fields, block_bytes, scale_at, zero_at = row
    masks = [mask(*map(int, field.split("-"))) for field in fields.split(" and ")]
    assert changed_bits(spec, 5, 37) == dict(zip(map(int, bytes_.split(" and ")), masks, strict=True))
    assert spec.block_bytes == int(block_bytes)
    scales, zeros = np.zeros((896, 4), np.float32), np.zeros((896, 4), np.float32)
    scales[5, 0], zeros[5, 0] = 3 * 2.0**-8, 7.0
    halves = pack_quantized(Quantized(np.zeros((896, 256), np.uint8), scales, zeros), spec).view(np.float16)
    assert (halves[int(scale_at) // 2], halves[int(zero_at) // 2]) == (3, 7)


def mask(low: int, high: int) -> int:
    return sum(1 << bit for bit in range(low, high + 1))


# ------------------------------------------------------------------------------------- README


def test_commands_and_options_in_documents_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = "\n".join(read(name) for name in DOCUMENTS)
    used = re.findall(r"(?:^|[`/])moray ([a-z]+)([^`#\n]*)", text, re.MULTILINE)
    assert {name for name, _ in used} == set(commands)
    for name, words in used:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words.split() if word.startswith("--")} <= known, name


def test_bits_and_defaults_of_the_recipes_table() -> None:
    for short, full, bits in rows("README.md", r"`(hqq\d)` = `(hqq\d:\d+)` \| ([\d.]+)"):
        assert str(Recipe.parse(short)["experts"]) == full
        assert bits_a_weight(full) == float(bits)
    for full, bits in re.findall(r"`(hqq\d:\d+)` has ([\d.]+)", read("README.md")):
        assert bits_a_weight(full) == float(bits)
    for text in re.findall(r"--recipe ([a-z]\S+)", read("README.md")):
        Recipe.parse(text)


def bits_a_weight(scheme_text: str) -> float:
    scheme = Recipe.parse(scheme_text)["experts"]
    return 8 * PackedSpec(16, 4096, scheme.encoding, scheme.group).num_bytes / (16 * 4096)


# ------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize("file", ENGINE_CONFIGS, ids=lambda file: file.stem)
def test_engine_configurations_load(file: Path) -> None:
    make_config({}, file)


def test_the_example_states_every_key_at_its_default() -> None:
    file = ROOT / "configs" / "engine" / "local.yaml"
    assert make_config({}, file) == EngineConfig()
    assert list(yaml.safe_load(file.read_text(encoding="utf-8"))) == list(EngineConfig.model_fields)

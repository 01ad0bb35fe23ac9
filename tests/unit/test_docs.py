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
from moray.runtime.convert.recipe import PRESETS, Recipe
from moray.runtime.layout.packed import Encoding, PackedSpec, Quantized, pack_quantized, unpack_quantized

ROOT = Path(__file__).parents[2]
SCHEME = r"hqq\d:\d+(?::s8)?"
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
    listed = rows("docs/architecture.md", r"`([a-z0-9_/]+\.py)` \| .+")
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


@pytest.mark.parametrize("encoding", ["q4", "q3", "q2"])
def test_the_worked_example_of_second_level_scales(encoding: Encoding) -> None:
    spec = PackedSpec(896, 256, encoding, 64, "u8")
    ((block_bytes, scale_at, zero_at, super_at),) = (
        map(int, row) for row in rows("docs/format.md", rf"`{encoding}` \| (\d+) \| (\d+) \| (\d+) \| (\d+)")
    )
    assert spec.block_bytes == block_bytes
    packed = np.zeros(spec.num_bytes, np.uint8)
    packed[scale_at], packed[zero_at] = 200, 124
    packed[super_at : super_at + 2] = np.array([0.5], np.float16).view(np.uint8)
    quantized = unpack_quantized(packed, spec)
    assert np.argwhere(quantized.scales).tolist() == [[5, 0]] and quantized.scales[5, 0] == 200 * 0.5 * 2.0**-16
    step, lowest = 2.0 ** (spec.bits - 7), -(2.0 ** (spec.bits - 1))
    assert quantized.zeros[5, 0] == 124 * step + lowest and (np.delete(quantized.zeros[:, 0], 5) == lowest).all()
    if encoding == "q4":
        text = read("docs/format.md")
        scale, zero, value = re.search(
            r"give scale ([\d.]+) and zero ([\d.]+),\s+so q = 9 is ([\d.]+\d)", text
        ).groups()
        assert (float(scale), float(zero)) == (quantized.scales[5, 0], quantized.zeros[5, 0])
        assert float(value) == (9 - quantized.zeros[5, 0]) * quantized.scales[5, 0]


def mask(low: int, high: int) -> int:
    return sum(1 << bit for bit in range(low, high + 1))


# ------------------------------------------------------------------------------------- README


def test_commands_and_options_in_documents_exist() -> None:
    commands = all_commands(typer.main.get_command(app))
    text = "\n".join(read(name) for name in DOCUMENTS)
    used = [
        split_command(line, commands) for line in re.findall(r"(?:^|[`/])moray ([a-z][^`#\n]*)", text, re.MULTILINE)
    ]
    assert {name for name, _ in used} >= {name for name, command in commands.items() if not is_group(command)}
    for name, words in used:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, name


def all_commands(group: Any) -> dict[str, Any]:
    """By name as typed, the groups and what is in them: ``bench``, ``bench kernels``."""
    found = {}
    for name, command in group.commands.items():
        found[name] = command
        if is_group(command):
            found |= {f"{name} {inner}": below for inner, below in all_commands(command).items()}
    return found


def is_group(command: Any) -> bool:
    return hasattr(command, "commands")


def split_command(line: str, commands: dict[str, Any]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and the words after it."""
    words = line.split()
    length = 2 if words[0] in commands and is_group(commands[words[0]]) and len(words) > 1 else 1
    name = " ".join(words[:length])
    assert name in commands, f"a document has `moray {name}`"
    return name, words[length:]


def test_bits_and_defaults_of_the_recipes_table() -> None:
    for short, full, bits in rows("README.md", rf"`(hqq\d)` = `({SCHEME})` \| ([\d.]+)"):
        assert str(Recipe.parse(short)["experts"]) == full
        assert bits_a_weight(full) == float(bits)
    listed = rows("README.md", rf"`({SCHEME})` \| ([\d.]+)")
    for full, bits in listed + re.findall(rf"`({SCHEME})` has ([\d.]+)", read("README.md")):
        assert bits_a_weight(full) == float(bits)
    for text in re.findall(r"--recipe ([a-z]\S+)", read("README.md")):
        Recipe.parse(text)


def bits_a_weight(scheme_text: str) -> float:
    scheme = Recipe.parse(scheme_text)["experts"]
    spec = PackedSpec(16, 4096, scheme.encoding, scheme.group, scheme.meta)
    return round(8 * spec.num_bytes / (16 * 4096), 2)


def test_presets_of_the_recipes_table() -> None:
    listed = rows("README.md", rf"`(paper-\w+)` \| `({SCHEME})` \| `({SCHEME})`")
    assert {name: f"experts={experts},attention={attention}" for name, experts, attention in listed} == PRESETS
    (option,) = (p for p in typer.main.get_command(app).commands["convert"].params if p.name == "recipe")  # type: ignore[attr-defined]
    assert all(name in option.help for name in PRESETS)


# ------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize("file", ENGINE_CONFIGS, ids=lambda file: file.stem)
def test_engine_configurations_load(file: Path) -> None:
    make_config({}, file)


def test_the_example_states_every_key_at_its_default() -> None:
    file = ROOT / "configs" / "engine" / "local.yaml"
    assert make_config({}, file) == EngineConfig()
    assert list(yaml.safe_load(file.read_text(encoding="utf-8"))) == list(EngineConfig.model_fields)

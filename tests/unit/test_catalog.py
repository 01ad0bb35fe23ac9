from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import FAMILIES, tiny_checkpoint, tiny_config
from typer.testing import CliRunner

from moray.deploy.cli import app
from moray.runtime.convert.converter import convert
from moray.runtime.errors import CheckpointError, UnsupportedModelError
from moray.runtime.model.adapters import adapted_families
from moray.runtime.model.catalog import EXCEPTIONS, SAMPLE, FamilyEntry, list_families
from moray.runtime.model.families import build_model, load_config, supported_families


@pytest.fixture(scope="module")
def entries() -> dict[str, FamilyEntry]:
    return {entry.model_type: entry for entry in list_families()}


def test_every_family_is_listed_or_excepted(entries: dict[str, FamilyEntry]) -> None:
    """A folder of transformers with experts has a model type that is run, or one that is an exception."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    listed = {model_type_to_module_name(model_type) for model_type in entries}
    assert set(supported_families()) <= listed
    assert set(adapted_families()) <= set(supported_families())
    assert {model_type for model_type, entry in entries.items() if not entry.route} == set(EXCEPTIONS)
    assert set(SAMPLE) <= set(entries) - set(EXCEPTIONS)
    assert set(FAMILIES) <= set(SAMPLE)


def test_entries_say_how_a_family_is_run(entries: dict[str, FamilyEntry]) -> None:
    mixtral, llama4, beam = entries["mixtral"], entries["llama4"], entries["beam"]
    assert (mixtral.architecture, mixtral.route, mixtral.text_only) == ("MixtralForCausalLM", "interface", False)
    assert mixtral.kernels == ("experts", "attention", "router") and mixtral.tested == "default suite"
    assert llama4.route == "adapter" and llama4.text_only
    assert beam.tested == "sweep"
    assert entries["jetmoe"].tested == f"exception: {EXCEPTIONS['jetmoe']}"


@pytest.mark.parametrize("model_type", EXCEPTIONS)
def test_exceptions_are_refused(model_type: str, tmp_path: Path) -> None:
    """Fails if transformers does not know the family, and if the family works: then it is no exception any more."""
    with_experts = {"text_config": {"num_experts": 8}} if model_type == "diffusion_gemma" else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | with_experts))
    with pytest.raises(UnsupportedModelError, match=model_type) as raised:
        load_config(tmp_path)
    assert "dense" not in str(raised.value) and "unknown" not in str(raised.value)


def test_the_command_prints_the_same_table(entries: dict[str, FamilyEntry]) -> None:
    result = CliRunner().invoke(app, ["families", "--json"])
    assert result.exit_code == 0
    families = json.loads(result.stdout)["families"]
    assert [family["model_type"] for family in families] == sorted(entries)
    assert all(family["tested"] for family in families)


@pytest.mark.parametrize(
    ("model_type", "parts"),
    [("qwen3_vl_moe", {"model.visual"}), ("llama4", {"vision_model", "multi_modal_projector"})],
)
def test_a_multimodal_model_is_converted_for_text(model_type: str, parts: set[str], tmp_path: Path) -> None:
    """Through the multimodal class without its tower, and through the class that transformers has for text."""
    manifest = convert(tiny_checkpoint(model_type, tmp_path / "checkpoint"), tmp_path / "store", "none")
    left_out = [note for note in manifest.notes if note.startswith("left out, not for text: ")]
    assert {note.split(": ")[1].split(" (")[0] for note in left_out} == parts
    assert len(left_out) == len(manifest.notes)
    names = {name for name, _ in build_model(tiny_config(model_type), torch.float32, "meta").named_modules()}
    assert not any("vis" in name for name in names)


def test_flat_experts_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("dbrx", tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    config["ffn_config"]["moe_num_experts"] = 7
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json"):
        convert(checkpoint, tmp_path / "store", "none")

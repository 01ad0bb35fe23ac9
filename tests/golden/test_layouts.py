"""Checkpoints with the keys, types, files and configurations of published repositories."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.layouts import LAYOUTS, Layout, Listed, Written, write_layout
from helpers.reference import runner, stock_logits, stock_model
from helpers.stores import state_of_store

from moray.runtime.convert.converter import convert
from moray.runtime.store.store import Store

PROMPT = [3, 17, 42, 99, 7, 150, 23, 64, 5, 88, 120, 31]


def num_parameters(one: Listed) -> int:
    return math.prod(one.shape)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_list_adds_up_to_what_the_hub_shows(name: str) -> None:
    layout = Layout.read(name, tiny=False)
    listed = layout.listed
    assert len({one.name for one in listed}) == len(listed)
    if (parameters := layout.document.get("parameters")) is not None:
        assert sum(num_parameters(one) for one in listed) == parameters
    if (size := layout.document.get("bytes")) is not None:
        assert sum(one.num_bytes for one in listed) == size


@pytest.fixture(scope="module", params=LAYOUTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, Written, Path]:
    root = tmp_path_factory.mktemp(request.param)
    layout = Layout.read(request.param)
    written = write_layout(layout, root)
    convert(written.checkpoint, root / "store", "none")
    return layout, written, root / "store"


def test_logits_equal_transformers(made: tuple[Layout, Written, Path]) -> None:
    layout, written, store = made
    own = layout.document["reference"] == "own"
    expected = stock_logits(stock_model(written.checkpoint if own else written.plain), PROMPT)
    assert expected.std() > 0.1
    with runner(store, "float") as opened:
        difference = (opened.logits(PROMPT) - expected).abs().max()
    assert difference / max(1.0, expected.abs().max().item()) < 1e-5


def test_every_weight_is_the_lists(made: tuple[Layout, Written, Path]) -> None:
    """Bit for bit, by transformers' reading of the same weights without quantization."""
    layout, written, store = made
    model = stock_model(written.plain)
    if layout.document.get("adapter"):
        pytest.skip("an adapter gives the experts other names than transformers: the logits are compared")
    with Store.open(store) as opened:
        state = state_of_store(opened, model)
        notes = opened.manifest.notes
    left_out = tuple(layout.document.get("left_out", []))
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(left_out)}
    assert set(expected) - set(state) <= set(model.all_tied_weights_keys)
    for name, tensor in state.items():
        assert torch.equal(tensor.float(), expected[name].float()), name
    unused = layout.document.get("unused", [])
    assert len(notes) == len(unused)
    for note, fragment in zip(notes, unused, strict=True):
        assert fragment in note


def test_the_files_beside_change_nothing(made: tuple[Layout, Written, Path]) -> None:
    layout, _, store = made
    copied = {path.name for path in store.iterdir()}
    assert not copied & {Path(name).parts[0] for name in layout.document.get("extra", []) if "template" not in name}

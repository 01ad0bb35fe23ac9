"""Quantized recipes: the same logits as transformers with the dequantized weights put in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.reference import greedy, runner, stock_greedy, stock_logits, stock_model
from helpers.stores import state_of_store
from transformers import AutoModelForCausalLM, PreTrainedModel

from moray.deploy.config import demo_store
from moray.runtime.model.families import load_config
from moray.runtime.store.store import Store

PROMPT = [3, 17, 42, 99, 7, 150, 23, 64, 5, 88, 120, 31]


def dequantized_model(path: Path) -> PreTrainedModel:
    """Transformers' own model with the weights that a store stands for."""
    config = load_config(path)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with Store.open(path) as store:
        result = model.load_state_dict(state_of_store(store, model), strict=False)
    assert set(result.missing_keys) <= {"lm_head.weight"}, result  # a tied head is not stored twice
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("recipe", ["hqq8", "hqq4", "hqq3", "hqq2", "experts=hqq2:16,attention=hqq4,embeddings=hqq8"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_float_equals_the_dequantized_model(family: str, recipe: str, store: Callable[..., Path]) -> None:
    path = store(family, recipe)
    expected = stock_logits(dequantized_model(path), PROMPT)
    with runner(path, "float") as made:
        logits = made.logits(PROMPT)
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-3


def test_trained_model_gives_the_same_64_tokens_as_transformers() -> None:
    model = dequantized_model(demo_store())
    with runner(demo_store(), "float") as made:
        ids = list(made.encode("import os\nimport sys\n\n\ndef main(argv=None):\n"))
        expected = stock_logits(model, ids)
        assert (made.logits(ids) - expected).abs().max() / expected.abs().max() < 1e-5
        assert greedy(made, ids, 64) == stock_greedy(model, ids, 64)


def test_int8_stays_near_the_float_class(checkpoint: Callable[[str], Path]) -> None:
    """int8 activations change the trained model's predictions a little, and only a little."""
    with runner(demo_store(), "float") as reference, runner(demo_store(), "int8") as made:
        ids = list(made.encode(Path(torch.__file__).read_text()[:4000]))[:512]
        target = torch.tensor(ids[1:])
        losses = [torch.nn.functional.cross_entropy(one.logits(ids)[:-1], target).item() for one in (reference, made)]
    assert losses[0] != losses[1]  # another class: other bits
    assert abs(losses[1] - losses[0]) < 0.02


def test_stock_checkpoint_and_store_agree_on_the_reference(
    checkpoint: Callable[[str], Path], store: Callable[..., Path]
) -> None:
    """The reference above is sound: at recipe none it is exactly transformers' own model."""
    expected = stock_logits(stock_model(checkpoint("mixtral")), PROMPT)
    assert torch.equal(stock_logits(dequantized_model(store("mixtral", "none")), PROMPT), expected)

"""Every family of the installed transformers against transformers itself: ``pytest -m sweep``, a few minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.batches import worst_difference
from helpers.checkpoints import tiny_checkpoint
from helpers.reference import greedy, runner, stock_generate, stock_logits, stock_model

from moray.runtime.convert.converter import convert
from moray.runtime.experts.function import ExpertsBinding
from moray.runtime.model.batch import cache_kind_of, make_batch_forward
from moray.runtime.model.catalog import EXCEPTIONS, list_families
from moray.runtime.planning.profile import GenerationLimits

PROMPT = [3, 17, 42, 99, 7, 150, 23, 64, 5, 88, 120, 31]
LONG = [3 + (7 * i * i) % 180 for i in range(70)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        is_deselected = "not sweep" in metafunc.config.option.markexpr  # then nothing needs to be found
        found = [] if is_deselected else [e.model_type for e in list_families() if e.model_type not in EXCEPTIONS]
        metafunc.parametrize("model_type", found)


@pytest.mark.sweep
def test_logits_tokens_and_turns_equal_transformers(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint(model_type, tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "store", "none")
    model = stock_model(checkpoint)
    expected = stock_logits(model, PROMPT)
    assert expected.std() > 0.1  # a model whose logits are all alike would pass anything
    with runner(tmp_path / "store", "float", GenerationLimits(1 << 20, chunk=16)) as made:
        assert (made.logits(PROMPT) - expected).abs().max() < 1e-5
        with monkeypatch.context() as patch:  # the equality is not vacuous: the experts matter
            patch.setattr(ExpertsBinding, "_compute", lambda self, module, x, *args: torch.zeros_like(x))
            patch.setattr(ExpertsBinding, "compute_routed", lambda self, kernel, module, x: torch.zeros_like(x))
            assert (made.logits(PROMPT) - expected).abs().max() > 0.05
        batch = make_batch_forward(made.model, cache_kind_of(made.model))
        assert batch is None or worst_difference(made.model, batch) < 1e-4
        # Through the step loop, over the family's own cache.
        assert greedy(made, PROMPT, 12) == stock_generate(model, PROMPT, 12)
        # Prompts in chunks, and a second turn on the first one's cache, where the cache can do it.
        first = greedy(made, LONG, 8)
        assert first == stock_generate(model, LONG, 8)
        turn = [*LONG, *first, 9, 8, 7]
        assert greedy(made, turn, 8) == stock_generate(model, turn, 8)
        edited = [*LONG[:50], 11, 12, 13]  # tokens are taken off the cache's end, where it can do it
        assert greedy(made, edited, 8) == stock_generate(model, edited, 8)

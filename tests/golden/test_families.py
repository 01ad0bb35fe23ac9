"""Recipe none, class float: the same logits as transformers' own eager float32 model, family by family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.batches import worst_difference
from helpers.reference import greedy, runner, stock_greedy, stock_logits, stock_model

from moray.runtime.model.batch import cache_kind_of, describe_batch, make_batch_forward
from moray.runtime.model.catalog import SAMPLE
from moray.runtime.planning.measure import measure_profile
from moray.runtime.planning.profile import GenerationLimits
from moray.runtime.store.store import Store

PROMPT = [3, 17, 42, 99, 7, 150, 23, 64, 5, 88, 120, 31]


def _could_batch(path: Path) -> bool:
    """What ``moray info`` says of the store."""
    with Store.open(path) as opened:
        return measure_profile(opened).sequence.can_batch


#: How tokens of several sequences are computed, where it is not with padding.
BATCHES = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "granitemoe", "glm4_moe", "qwen3_vl_moe"), "fused"),
    **dict.fromkeys(("minimax", "deepseek_v4"), "in turn"),  # caches of their own
}


@pytest.mark.parametrize("family", SAMPLE)
def test_logits_and_tokens_equal_transformers(
    family: str, checkpoint: Callable[[str], Path], store: Callable[..., Path]
) -> None:
    model = stock_model(checkpoint(family))
    expected = stock_logits(model, PROMPT)
    assert expected.std() > 0.1  # a model whose logits are all alike would pass anything
    with runner(store(family, "none"), "float") as made:
        assert (made.logits(PROMPT) - expected).abs().max() < 1e-5
        # Through the step loop too: prefill, then one token at a time over the family's own cache.
        tokens, wanted = greedy(made, PROMPT, 16), stock_greedy(model, PROMPT, 16)
        ended = tokens[-1] == model.config.get_text_config().eos_token_id
        assert tokens == (wanted[: len(tokens)] if ended else wanted)
        assert made.stats().num_used > 0
        batch = make_batch_forward(made.model, cache_kind_of(made.model))
        assert describe_batch(batch) == BATCHES.get(family, "padded")
        assert (batch is not None) == _could_batch(store(family, "none"))
        assert batch is None or worst_difference(made.model, batch) < 1e-5


#: Which parts run fused: attention, router, block of router and experts, the layer around them, and the whole model.
FUSED = {
    "mixtral": "attention router block layer model",
    "qwen2_moe": "attention router layer model",  # its block adds a shared expert
    "qwen3_moe": "attention router block layer model",
    "olmoe": "router block model",  # norms over all heads at once
    "gpt_oss": "router",  # attention sinks; its block returns two things
    "phimoe": "attention model",  # LayerNorm, routing of its own
    "granitemoe": "attention",  # multipliers
    "glm4_moe": "attention layer model",
    "deepseek_v3": "model",  # latent attention, grouped routing
}


@pytest.mark.parametrize("family", FUSED)
def test_the_parts_that_are_usual_are_fused(family: str, store: Callable[..., Path]) -> None:
    with runner(store(family, "none"), "float") as made:
        forwards = [vars(module).get("forward") for module in made.model.modules()]
    names = {type(forward).__name__ for forward in forwards if forward is not None}
    assert names == {"Fused" + part.capitalize() for part in FUSED[family].split()}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_decide_the_result(
    family: str, checkpoint: Callable[[str], Path], store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The equality above is not vacuous: without the experts' output the logits are far away."""
    expected = stock_logits(stock_model(checkpoint(family)), PROMPT)
    monkeypatch.setattr(
        "moray.runtime.experts.function.ExpertsBinding._compute",
        lambda self, module, x, weights, grouping, lease: torch.zeros_like(x),
    )
    monkeypatch.setattr(
        "moray.runtime.experts.function.ExpertsBinding.compute_routed",
        lambda self, kernel, module, x: torch.zeros_like(x),
    )
    with runner(store(family, "none"), "float") as made:
        assert (made.logits(PROMPT) - expected).abs().max() > 0.05


@pytest.mark.parametrize("lanes", ["device-copy", "host-cpu"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_path_of_devices_computes_the_same(
    family: str, lanes: str, checkpoint: Callable[[str], Path], store: Callable[..., Path]
) -> None:
    """What a GPU does (copy, dequantize, multiply with torch) and its host's CPU beside it, run on the CPU."""
    expected = stock_logits(stock_model(checkpoint(family)), PROMPT)
    with runner(store(family, "none"), "float", device_slots=2, lanes=lanes) as made:
        assert (made.logits(PROMPT) - expected).abs().max() < 1e-5
        stats = made.device_stats()
    assert stats is not None and stats.num_slots == 2
    assert (stats.copies > 0) == (lanes == "device-copy") and (stats.uses_by_lane["host-cpu"] > 0) == (
        stats.copies == 0
    )


@pytest.mark.parametrize("family", ["mixtral", "jamba", "gpt_oss", "deepseek_v2"])
def test_long_prompts_and_second_turns_equal_transformers(
    family: str, checkpoint: Callable[[str], Path], store: Callable[..., Path]
) -> None:
    """Prompts in chunks and kept caches, over full, sliding, compressed and linear attention."""
    model = stock_model(checkpoint(family))
    prompt = [3 + (7 * i * i) % 180 for i in range(70)]
    with runner(store(family, "none"), "float", GenerationLimits(1 << 20, chunk=16)) as made:
        first = greedy(made, prompt, 8)
        assert first == stock_greedy(model, prompt, 8)[: len(first)]
        turn = [*prompt, *first, 9, 8, 7]
        second = greedy(made, turn, 8)
        assert second == stock_greedy(model, turn, 8)[: len(second)]

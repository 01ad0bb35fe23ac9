"""A new token's way through several layers in one launch: the bits, the counts and the exceptions of its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.reference import runner
from transformers import MixtralConfig, MixtralForCausalLM

from moray.runtime.experts.source import LeaseTable
from moray.runtime.generation.runner import Runner
from moray.runtime.model import layer_run
from moray.runtime.model.batch import BatchForward
from moray.runtime.model.kv_layer import new_cache
from moray.runtime.model.layer_run import LayerRun
from moray.runtime.model.model_modules import FusedModel, fuse_model, fused_step

PROMPT = torch.arange(3, 24)[None]


@pytest.fixture(params=[("mixtral", "none", "float"), ("qwen3_moe", "hqq4:32", "int8")], ids=lambda p: p[0])
def made(request: pytest.FixtureRequest, store: Callable[..., Path]) -> Iterator[Runner]:
    family, recipe, numerics = request.param
    with runner(store(family, recipe), numerics) as found, torch.inference_mode():
        yield found


def prefilled(made: Runner) -> Any:
    cache = new_cache(made.model.config)
    made.model(input_ids=PROMPT, past_key_values=cache, use_cache=True)
    return cache


def run_of(made: Runner) -> LayerRun:
    (run,) = made.model.base_model.forward._parts
    assert isinstance(run, LayerRun)
    return run


def logits_of(made: Runner, cache: Any, token: int) -> torch.Tensor:
    logits: torch.Tensor = made.model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    return logits


def by_layers(made: Runner, cache: Any, token: int) -> torch.Tensor:
    """The same, each layer by itself."""
    forward = made.model.base_model.forward
    joined, forward._parts = forward._parts, list(made.model.base_model.layers)
    try:
        return logits_of(made, cache, token)
    finally:
        forward._parts = joined


def counts(made: Runner) -> tuple[Any, ...]:
    stats = made.stats()
    return np.array(stats.tokens_per_expert), stats.uses, stats.layer_calls, stats.bytes_by_source["memory"]


def test_layers_in_one_launch_have_the_bits_and_the_counts_of_single_ones(made: Runner) -> None:
    mine = prefilled(made)
    its, calls = copy.deepcopy(mine), []
    run = run_of(made)
    compute, run._compute = run._compute, lambda *given: (calls.append(1), compute(*given))[1]  # type: ignore[method-assign, func-returns-value]
    for token in range(5, 9):
        before = counts(made)
        one = by_layers(made, its, token)
        middle = counts(made)
        assert torch.equal(logits_of(made, mine, token), one) and len(calls) == token - 4
        after = counts(made)
        for a, b, c in zip(before, middle, after, strict=True):
            assert np.array_equal(b - a, c - b)
        assert made.stats().compute_s > 0
    for a, b in zip(mine.layers, its.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("missed", [None, 1])
def test_a_batch_in_one_launch_has_the_bits_and_the_counts_of_its_layers(
    made: Runner, missed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, model, launches = BatchForward(made.model, "fused"), made.model.base_model.forward, []
    first, other = prefilled(made), new_cache(made.model.config)
    made.model(input_ids=PROMPT[:, :5], past_key_values=other, use_cache=True)
    its_first, its_other = copy.deepcopy(first), copy.deepcopy(other)
    launch = layer_run.batch_layers_at
    monkeypatch.setattr(layer_run, "batch_layers_at", lambda *given: (launches.append(1), launch(*given))[1])
    before = counts(made)
    with monkeypatch.context() as patch:
        patch.setattr(model, "_parts", list(made.model.base_model.layers))
        expected = forward([7, 8, 9], [its_first, its_other, its_other])  # the last two are of one sequence
    middle = counts(made)
    assert not launches
    if missed is not None:
        table = run_of(made)._bindings[missed].source.table(missed)
        assert table is not None
        table.generations[:] += 2
    assert torch.equal(forward([7, 8, 9], [first, other, other]), expected)
    assert len(launches) == (1 if missed is None else 2)
    for a, b, c in zip(before, middle, counts(made), strict=True):
        assert np.array_equal(b - a, c - b)
    for mine, its in ((first, its_first), (other, its_other)):
        for a, b in zip(mine.layers, its.layers, strict=True):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_layer_that_misses_an_expert_is_completed_by_itself(made: Runner, place: int) -> None:
    mine = prefilled(made)
    its, binding = copy.deepcopy(mine), run_of(made)._bindings[place]
    expected, before = by_layers(made, its, 7), made.stats()
    source, asked = binding.source, []
    table, fetch = source.table, source.fetch

    def moved(layer: int) -> LeaseTable | None:
        found = table(layer)
        if found is None or layer != binding.layer:
            return found
        return LeaseTable.fixed(found.addresses, found.counters, found.generations + 2)

    source.table = moved  # type: ignore[method-assign]
    source.fetch = lambda layer, experts: (asked.append(layer), fetch(layer, experts))[1]  # type: ignore[method-assign, func-returns-value]
    assert torch.equal(logits_of(made, mine, 7), expected)
    assert asked == [binding.layer]
    assert made.stats().layer_calls - before.layer_calls == len(made.model.base_model.layers)
    assert made.stats().uses > before.uses


def test_a_hooked_or_replaced_layer_is_called(made: Runner) -> None:
    mine = prefilled(made)
    layer, seen = made.model.base_model.layers[1], []
    hook = layer.register_forward_hook(lambda *_: seen.append("hook"))
    expected = logits_of(made, copy.deepcopy(mine), 7)
    hook.remove()
    fused = layer.forward
    layer.forward = lambda *given, **named: (seen.append("forward"), fused(*given, **named))[1]
    assert torch.equal(logits_of(made, mine, 7), expected)
    layer.forward = fused
    assert seen == ["hook", "forward"]


class Watch:
    def __init__(self, wants_inputs: bool) -> None:
        self.wants_inputs = wants_inputs
        self.calls: list[Any] = []

    def before(self, layer: int, x: torch.Tensor) -> None:
        self.calls.append(layer)

    def after(self, call: Any) -> None:
        self.used(call.layer, call.num_tokens, call.experts)

    def used(self, layer: int, num_tokens: int, experts: Any) -> None:
        assert num_tokens == 1
        self.calls.append((layer, list(experts)))


@pytest.mark.parametrize("missed", [None, 1])
def test_who_watches_is_told_what_each_layer_used(
    made: Runner, missed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = prefilled(made)
    bindings, launches = run_of(made)._bindings, []
    by_itself, told = Watch(wants_inputs=True), Watch(wants_inputs=False)
    for binding in bindings:
        binding.watch = by_itself  # type: ignore[assignment]
    expected = logits_of(made, copy.deepcopy(mine), 7)
    assert by_itself.calls[::2] == [binding.layer for binding in bindings]  # each was announced before
    for binding in bindings:
        binding.watch = told  # type: ignore[assignment]
    if missed is not None:
        moved = bindings[missed].source.table(missed)
        assert moved is not None
        moved.generations[:] += 2
    launch = layer_run.layers_at
    monkeypatch.setattr(layer_run, "layers_at", lambda *given: (launches.append(1), launch(*given))[1])
    assert torch.equal(logits_of(made, mine, 7), expected)
    assert [call for call in told.calls if isinstance(call, tuple)] == by_itself.calls[1::2]
    assert len(launches) == (1 if missed is None else 2)
    assert [call for call in told.calls if not isinstance(call, tuple)] == ([] if missed is None else [missed])


# ----------------------------------------------------------------------------------------- steps


def test_a_step_has_the_models_logits(made: Runner) -> None:
    step, mine = fused_step(made.model), prefilled(made)
    assert step is not None
    assert step(5, new_cache(made.model.config)) is None  # nothing before it
    its = copy.deepcopy(mine)
    for token in (5, 6):
        got = step(token, mine)
        assert got is not None and torch.equal(got, logits_of(made, its, token))
    assert mine.get_seq_length() == its.get_seq_length() == PROMPT.shape[1] + 2
    hook = made.model.register_forward_pre_hook(lambda *_: None)
    assert step(7, mine) is None
    hook.remove()


def test_a_model_that_scales_its_logits_is_asked_itself(store: Callable[..., Path]) -> None:
    with runner(store("granitemoe", "none"), "float") as made:
        assert fused_step(made.model) is None


@pytest.mark.parametrize("num_layers", [4, 96])
def test_the_short_step_is_taken_if_it_gives_the_models_own_state(
    num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=1, num_hidden_layers=num_layers, num_local_experts=2)
    model = MixtralForCausalLM(config).eval()
    right = FusedModel._compute

    def slightly_wrong(self: FusedModel, ids: torch.Tensor, cache: Any, positions: list[int]) -> torch.Tensor:
        return right(self, ids, cache, positions) * 1.001

    with monkeypatch.context() as patch:
        patch.setattr(FusedModel, "_compute", slightly_wrong)
        fuse_model(model)
        assert "forward" not in vars(model.base_model)
    fuse_model(model)
    assert isinstance(model.base_model.forward, FusedModel)

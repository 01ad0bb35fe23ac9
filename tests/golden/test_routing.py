"""Prefetch prediction, family by family: what is found repeats the model's own routing, and predicts as the paper says.

The reference is the definition: the next layer's norm and router, applied to the residual that came into this layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from torch import nn

from moray.runtime.convert.converter import convert
from moray.runtime.experts.function import ExpertsBinding
from moray.runtime.experts.source import InProcessSource
from moray.runtime.model.catalog import EXCEPTIONS, SAMPLE, list_families
from moray.runtime.model.loader import bind_experts, load_model
from moray.runtime.prefetch.discover import LayerRouting
from moray.runtime.prefetch.predictor import Predictor
from moray.runtime.prefetch.routers import Extra
from moray.runtime.store.store import Store


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        is_deselected = "not sweep" in metafunc.config.option.markexpr  # then nothing needs to be found
        found = [] if is_deselected else [e.model_type for e in list_families()]
        metafunc.parametrize("model_type", [t for t in found if t not in EXCEPTIONS and t not in SAMPLE])


@pytest.mark.parametrize("family", SAMPLE)
def test_predictions_are_what_the_next_router_says_of_the_residual(family: str, store: Callable[..., Path]) -> None:
    check(store(family, "none"))


@pytest.mark.sweep
def test_predictions_of_the_other_families(model_type: str, tmp_path: Path) -> None:
    convert(tiny_checkpoint(model_type, tmp_path / "checkpoint"), tmp_path / "store", "none")
    check(tmp_path / "store")


@dataclass
class Seen:
    """What went into each layer of one run, by MoE layer."""

    residuals: dict[int, torch.Tensor] = field(default_factory=dict)
    returned: dict[int, Any] = field(default_factory=dict)
    x: dict[int, torch.Tensor] = field(default_factory=dict)
    ids: dict[int, list[int]] = field(default_factory=dict)
    predicted: dict[int, list[int]] = field(default_factory=dict)  # by target, in order


@torch.inference_mode()
def check(path: Path) -> None:
    with loaded(path) as model:
        make_norms_differ(model)
        before = {name: vars(module).get("forward") for name, module in model.named_modules()}
        predictor = Predictor(model, depth=1)
        assert {name: vars(module).get("forward") for name, module in model.named_modules()} == before
        assert [routing.reason for routing in predictor.routings] == [""] * len(predictor.routings)
        assert predictor.unpredictable == {}
        for tokens in ([3, 17], [3], [17], [42], [99], [7], [150]):
            seen = run(model, predictor, tokens)
            for routing in predictor.routings:
                layer = routing.layer
                again = choose(routing, seen.residuals[layer], seen, tokens)
                assert again == seen.ids[layer]  # the very experts, in the router's order
                if layer > 0:
                    wanted = choose(routing, seen.residuals[layer - 1], seen, tokens)
                    known = {e for e in wanted if e < routing.router.num_experts}
                    assert set(seen.predicted[layer]) == known
                    assert len(seen.predicted[layer]) == len(known)
        predictor.close()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def make_norms_differ(model: nn.Module) -> None:
    """So much that what follows one norm tells little of what follows another, unless their ratio is known."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            for parameter in module.parameters(recurse=False):
                parameter.mul_(torch.exp(torch.randn(parameter.shape, generator=generator)))


@contextmanager
def loaded(path: Path) -> Iterator[Any]:
    with Store.open(path) as store:
        model, source = load_model(store, "float", torch.device("cpu")), InProcessSource(store)
        bind_experts(model, store, source, "float")
        try:
            yield model
        finally:
            source.close()


def run(model: Any, predictor: Predictor, tokens: list[int]) -> Seen:
    """The tokens through the model as it is used, predicting where the experts are called."""
    seen = Seen()
    compute = ExpertsBinding.forward

    def forward(self: ExpertsBinding, module: Any, x: torch.Tensor, ids: torch.Tensor, weights: Any) -> torch.Tensor:
        seen.ids[self.layer] = ids.reshape(-1).tolist()
        seen.predicted |= {p.layer: p.ids.tolist() for p in predictor.predict(self.layer, x)}
        return compute(self, module, x, ids, weights)

    with pytest.MonkeyPatch.context() as patch, ExitStack() as hooks:
        patch.setattr(ExpertsBinding, "forward", forward)
        patch.setattr(ExpertsBinding, "compute_routed", lambda *args: None)
        for routing in predictor.routings:
            for handle in watch(routing, seen):
                hooks.callback(handle.remove)
        model(input_ids=torch.tensor([tokens]), use_cache=False)
    return seen


def watch(routing: LayerRouting, seen: Seen) -> list[Any]:
    layer, router = routing.layer, routing.router

    def norm_is_given(module: nn.Module, args: Any) -> None:
        seen.residuals[layer] = args[0].clone()

    def router_is_given(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.returned[layer] = output
        if routing.norm is None:
            seen.residuals[layer] = (args[0] if args else kwargs[router.x_slot]).clone()

    handles = [router.module.register_forward_hook(router_is_given, with_kwargs=True)]
    if routing.norm is not None:
        handles.append(routing.norm.register_forward_pre_hook(norm_is_given))
    return handles


def choose(routing: LayerRouting, residual: torch.Tensor, seen: Seen, tokens: list[int]) -> list[int]:
    """The definition, through the modules' own classes."""

    def value(extra: Extra) -> Any:
        if extra.kind == "output":
            layer, position = extra.value
            return seen.returned[layer][position]
        return torch.tensor([tokens]) if extra.kind == "token_ids" else extra.value

    x = residual if routing.norm is None else type(routing.norm).forward(routing.norm, residual)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(routing.router.module, "forward") if "forward" in vars(routing.router.module) else None
        ids, _ = routing.router.choice(routing.router.returned(x, value))
    return ids.reshape(-1).tolist()

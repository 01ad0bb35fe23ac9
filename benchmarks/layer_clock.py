"""Where the time of a decoded token goes: clocks around a Mixtral's modules, for overhead.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moray.runtime.experts.meter import ExpertsStats

_PARTS = {
    "layer": r"model\.layers\.\d+",
    "attention": r"model\.layers\.\d+\.self_attn",
    "router": r"model\.layers\.\d+\.mlp\.gate",
    "experts": r"model\.layers\.\d+\.mlp\.experts",
}


@dataclass(frozen=True)
class LayerTimes:
    """Mean microseconds of one layer for one token. None: not visible from where it was measured, or part of *rest*."""

    attention: float | None
    router: float | None
    grouping: float | None
    lease: float | None
    kernel: float | None
    dispatch: float | None  # of the experts module, beside the three above
    rest: float | None  # norms, residuals, the layer's own Python
    layer: float | None
    outside: float | None  # of a whole token, not of a layer: embedding, head, sampling, step loop, delivery
    token: float


class LayerClock:
    """Seconds spent in each kind of module while the clock is attached. A pair of hooks adds about 2 us to a module."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._started: dict[nn.Module, float] = {}
        self.seconds = dict.fromkeys(_PARTS, 0.0)
        self.num_layers = model.config.num_hidden_layers

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles: list[Any] = []
        for name, module in self._model.named_modules():
            for part, pattern in _PARTS.items():
                if re.fullmatch(pattern, name):
                    handles += self._watch(part, module)
        assert len(handles) == 2 * len(_PARTS) * self.num_layers, "not a Mixtral"
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, part: str, module: nn.Module) -> list[Any]:
        def before(module: nn.Module, *_: object) -> None:
            self._started[module] = perf_counter()

        def after(module: nn.Module, *_: object) -> None:
            self.seconds[part] += perf_counter() - self._started[module]

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def times(
        self, num_tokens: int, seconds: float, before: ExpertsStats | None, after: ExpertsStats | None
    ) -> LayerTimes:
        """Of ``num_tokens`` single-token steps that took ``seconds``. The statistics are moray's, around them."""
        calls = num_tokens * self.num_layers
        attention, router, experts, layer = (
            1e6 * self.seconds[part] / calls or None for part in ("attention", "router", "experts", "layer")
        )
        assert layer is not None
        grouping, lease, kernel = _meter_times(before, after, calls)
        inside = (grouping or 0.0) + (lease or 0.0) + (kernel or 0.0)
        return LayerTimes(
            attention=attention,
            router=router,
            grouping=grouping,
            lease=lease,
            kernel=kernel if before else experts,
            dispatch=experts - inside if before and experts else None,
            rest=layer - (attention or 0.0) - (router or 0.0) - (experts or inside),
            layer=layer,
            outside=1e6 * seconds / num_tokens - layer * self.num_layers,
            token=1e6 * seconds / num_tokens,
        )


def meter_times(
    num_tokens: int, num_layers: int, seconds: float, before: ExpertsStats, after: ExpertsStats
) -> LayerTimes:
    """What an engine's own statistics show of a process whose modules are out of reach."""
    grouping, lease, kernel = _meter_times(before, after, num_tokens * num_layers)
    return LayerTimes(None, None, grouping, lease, kernel, None, None, None, None, 1e6 * seconds / num_tokens)


def _meter_times(
    before: ExpertsStats | None, after: ExpertsStats | None, calls: int
) -> tuple[float | None, float | None, float | None]:
    if before is None or after is None:
        return None, None, None
    made = after.layer_calls - before.layer_calls
    assert made == calls, f"{made} layer calls, expected {calls}"
    grouping, lease, kernel = (
        1e6 * (getattr(after, name) - getattr(before, name)) / calls for name in ("group_s", "lease_s", "compute_s")
    )
    return grouping, lease, kernel

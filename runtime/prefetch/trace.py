"""A short run of a loaded model with every module's call recorded, to see what its routers are given.

The modules run their classes' own forwards (a fused layer does not call its parts), no experts are read, and the model
is afterwards as it was before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moray.runtime.model.attention_modules import replaced_forward
from moray.runtime.model.families import expert_modules

_TOKENS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a module that returned. ``outputs``: what it returned; a tuple of one if it is no tuple."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Any, ...]

    def returns(self, tensor: torch.Tensor) -> bool:
        return any(is_same(output, tensor) for output in self.outputs)

    def is_given(self, tensor: torch.Tensor) -> bool:
        return any(is_same(value, tensor) for value in (*self.args, *self.kwargs.values()))


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsCall:
    """What a layer's experts were given: x [P, H], ids and weights [P, K]."""

    layer: int
    path: str
    experts: nn.Module
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class Trace:
    """``calls`` in the order in which they returned: parts before what they are parts of."""

    token_ids: torch.Tensor
    calls: list[Call]
    experts: list[ExpertsCall]


def is_same(value: Any, tensor: torch.Tensor) -> bool:
    """Whether a value is this tensor's memory, in whatever shape."""
    return (
        torch.is_tensor(value)
        and value.data_ptr() == tensor.data_ptr()
        and value.numel() == tensor.numel()
        and value.dtype == tensor.dtype
    )


@torch.inference_mode()
def record(model: nn.Module) -> Trace:
    """Run a few tokens. What was returned is kept, so that no memory is used twice and addresses tell tensors apart.

    Raises whatever the model raises.
    """
    token_ids = torch.arange(1, _TOKENS + 1, device=next(model.parameters()).device)[None]
    trace = Trace(token_ids, [], [])

    def on_return(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs = tuple(output) if isinstance(output, tuple | list) else (output,)
        trace.calls.append(Call(module, args, kwargs, outputs))

    with plain_forwards(model), ExitStack() as stack:
        for layer, (path, experts) in enumerate(expert_modules(model)):
            stack.enter_context(replaced_forward(experts, _recorder(trace, layer, path, experts)))
        for module in model.modules():
            handle = module.register_forward_hook(on_return, with_kwargs=True)
            stack.callback(handle.remove)
        model(input_ids=token_ids, use_cache=False)
    return trace


@contextmanager
def plain_forwards(model: nn.Module) -> Iterator[None]:
    """Every module runs its class's own forward."""
    replaced = [(module, vars(module)["forward"]) for module in model.modules() if "forward" in vars(module)]
    for module, _ in replaced:
        del module.forward
    try:
        yield
    finally:
        for module, forward in replaced:
            module.forward = forward


def _recorder(trace: Trace, layer: int, path: str, experts: nn.Module) -> Any:
    def forward(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        trace.experts.append(ExpertsCall(layer, path, experts, x, ids, weights))
        return torch.zeros_like(x)

    return forward

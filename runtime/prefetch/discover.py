"""Each MoE layer's router, and the norm before it, found in a trace by which tensor went where.

Nothing here lists families. The experts' ids were returned by the router, the router's input by the norm; what was
found is run again on what was recorded, and must choose the recorded experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moray.runtime.model.families import expert_modules
from moray.runtime.prefetch.routers import Extra, Router, Slot
from moray.runtime.prefetch.trace import Call, ExpertsCall, Trace, is_same, plain_forwards, record


@dataclass(frozen=True, slots=True, eq=False)
class LayerRouting:
    """How one MoE layer chooses its experts: router(norm(residual)), or router(residual) if ``norm`` is None.

    ``takes_experts_input``: the router's input is what the experts are given, too.
    ``residual``: as recorded, a few tokens. ``reason``: why the choice cannot be repeated; "" if it can.
    """

    layer: int
    path: str
    router: Router | None = None
    norm: nn.Module | None = None
    residual: torch.Tensor | None = None
    takes_experts_input: bool = False
    reason: str = ""


@torch.inference_mode()
def discover(model: nn.Module) -> list[LayerRouting]:
    """Find out how each MoE layer of a loaded model routes, in layer order; runs four tokens through its trunk.

    A layer whose routing was not understood has a ``reason``; nothing is raised, and the model stays as it is.
    """
    try:
        trace = record(model)
    except Exception as error:  # whatever a family does that nobody thought of: there is no prefetch then
        why = " ".join(str(error).split()) or type(error).__name__
        return [_unknown(layer, path, f"the model cannot be traced: {why}") for layer, path in _layers_of(model)]
    finder = _Finder(model, trace)
    calls = {call.layer: call for call in trace.experts}
    with plain_forwards(model):
        return [
            finder.find(calls[layer]) if layer in calls else _unknown(layer, path, "its experts were not called")
            for layer, path in _layers_of(model)
        ]


def _layers_of(model: nn.Module) -> list[tuple[int, str]]:
    return [(layer, path) for layer, (path, _) in enumerate(expert_modules(model))]


def _unknown(layer: int, path: str, reason: str) -> LayerRouting:
    return LayerRouting(layer, path, reason=reason)


class _NotUnderstoodError(Exception):
    """Why a layer's routing cannot be repeated."""


class _Finder:
    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self._trace = trace
        self._modules = dict(model.named_modules())
        self._constants = {(t.data_ptr(), t.numel(), t.dtype) for t in (*model.parameters(), *model.buffers())}
        self._router_calls: dict[int, Call] = {}

    def find(self, experts: ExpertsCall) -> LayerRouting:
        try:
            return self._find(experts)
        except _NotUnderstoodError as error:
            return _unknown(experts.layer, experts.path, str(error))

    def _find(self, experts: ExpertsCall) -> LayerRouting:
        call, is_block = self._router_call(experts)
        self._router_calls[experts.layer] = call
        x_slot, x = _hidden_states(call)
        router = Router(
            module=call.module,
            experts=experts.experts,
            num_experts=int(experts.experts.num_experts),  # type: ignore[arg-type]
            is_block=is_block,
            x_slot=x_slot,
            extras=tuple(self._extras(call, x_slot)),
            ids_at=0 if is_block else _position(call, experts.ids),
            weights_at=1 if is_block else _position(call, experts.weights),
            is_3d=x.ndim == 3,
        )
        norm, residual = self._norm(call, x)
        found = LayerRouting(
            experts.layer, experts.path, router, norm, residual, takes_experts_input=is_same(experts.x, x)
        )
        self._check(found, experts)
        return found

    def _router_call(self, experts: ExpertsCall) -> tuple[Call, bool]:
        for call in self._trace.calls:
            if call.returns(experts.ids):
                return call, False
        parent = self._modules[experts.path.rpartition(".")[0]]
        for call in self._trace.calls:
            if call.module is parent:
                return call, True
        raise _NotUnderstoodError("no module returns the ids its experts are given")

    def _extras(self, call: Call, x_slot: Slot) -> list[Extra]:
        return [self._extra(slot, value, call) for slot, value in _given(call).items() if slot != x_slot]

    def _extra(self, slot: Slot, value: Any, call: Call) -> Extra:
        if value is None or isinstance(value, bool | int | float | str):
            return Extra(slot, "constant", value)
        if torch.is_tensor(value):
            if (value.data_ptr(), value.numel(), value.dtype) in self._constants:
                return Extra(slot, "constant", value)
            ids = self._trace.token_ids
            if (
                not value.is_floating_point()
                and value.numel() == ids.numel()
                and bool((value.reshape(-1) == ids).all())
            ):
                return Extra(slot, "token_ids")
            for layer, other in self._router_calls.items():
                if other is not call and other.returns(value):
                    return Extra(slot, "output", (layer, _position(other, value)))
        raise _NotUnderstoodError(f"its router, {type(call.module).__name__}, also takes {_name_of(call, slot)}")

    def _norm(self, router: Call, x: torch.Tensor) -> tuple[nn.Module | None, torch.Tensor]:
        """The norm that returned x, and its input; without one, None and x."""
        for call in self._trace.calls:
            if call is router:
                break
            if call.returns(x) and not call.is_given(x):  # not a module that passes on what it is given
                return (call.module, call.args[0]) if _is_norm(call, x) else (None, x)
        return None, x

    def _check(self, found: LayerRouting, experts: ExpertsCall) -> None:
        assert found.router is not None and found.residual is not None
        values = {"token_ids": self._trace.token_ids}

        def extra(wanted: Extra) -> Any:
            if wanted.kind == "output":
                layer, position = wanted.value
                return self._router_calls[layer].outputs[position]
            return values.get(wanted.kind, wanted.value)

        x = found.residual if found.norm is None else found.norm(found.residual)
        try:
            ids, _ = found.router.choice(found.router.returned(x, extra))
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise _NotUnderstoodError(f"its router cannot be called again: {why}") from error
        if not torch.equal(ids.reshape(-1), experts.ids.reshape(-1)):
            raise _NotUnderstoodError("its router chooses other experts when it is called again")


def _given(call: Call) -> dict[Slot, Any]:
    return dict(enumerate(call.args)) | call.kwargs


def _hidden_states(call: Call) -> tuple[Slot, torch.Tensor]:
    for slot, value in _given(call).items():
        if torch.is_tensor(value) and value.is_floating_point():
            return slot, value
    raise _NotUnderstoodError(f"its router, {type(call.module).__name__}, is given no hidden states")


def _position(call: Call, tensor: torch.Tensor) -> int:
    return next((i for i, output in enumerate(call.outputs) if is_same(output, tensor)), -1)


def _is_norm(call: Call, x: torch.Tensor) -> bool:
    """A module without parts that makes of one tensor another of its shape. What it computes is measured (norms.py)."""
    return (
        len(call.args) == 1
        and not call.kwargs
        and torch.is_tensor(call.args[0])
        and call.args[0].shape[-1] == x.shape[-1]
        and call.args[0].numel() == x.numel()
        and not list(call.module.children())
    )


def _name_of(call: Call, slot: Slot) -> str:
    if isinstance(slot, str):
        return slot
    names = call.module.forward.__code__.co_varnames
    return str(names[slot + 1]) if slot + 1 < len(names) else f"an argument at position {slot}"

"""Which experts the next layers will need, from what the present one is given.

As in "Fast Inference of Mixture-of-Experts Language Models with Offloading" (arXiv 2312.17238, section 3.2): the next
layer's norm and router, applied to the present residual. Where both layers' norms differ by gain and shift alone, the
residual is not needed: the next norm's output is made from the present one's (norms.py). Elsewhere the residual is
caught on its way into the present layer's norm.

Predictions never change what a model computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moray.runtime.arrays import Ints
from moray.runtime.prefetch.discover import LayerRouting, discover
from moray.runtime.prefetch.norms import IDENTITY, Affine, find_affine
from moray.runtime.prefetch.routers import Extra, Router

MAX_DEPTH = 3


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """Experts that MoE layer ``layer`` will probably need: ids int64 [K'], each once, most likely first."""

    layer: int
    ids: Ints


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """From one layer to a later one: router(affine(x)), or router(norm(residual)) if ``affine`` is None."""

    layer: int
    router: Router
    affine: Affine | None
    norm: nn.Module | None


class Predictor:
    """Predicts for a loaded model whose experts are bound. Used by the step loop's thread only.

    ``depth``: how many MoE layers ahead, 1 to 3. Some families need hooks on a few modules of the trunk: ``close``
    takes them off.
    """

    def __init__(self, model: nn.Module, depth: int = 1) -> None:
        assert 1 <= depth <= MAX_DEPTH, f"depth {depth} is not between 1 and {MAX_DEPTH}"
        self.depth = depth
        self.routings = discover(model)
        self._caught = _Caught()
        self._plans = [self._plan(routing) for routing in self.routings]
        self._catch_what_is_needed(model)

    @property
    def unpredictable(self) -> dict[int, str]:
        """MoE layer -> why no layer before it predicts its experts. Layer 0 has none before it and is not listed."""
        return {t.layer: self._why_not(t) for t in self.routings[1:] if not self._predicts(t.layer)}

    def predict(self, layer: int, x_TH: torch.Tensor) -> list[Prediction]:
        """What the layers after MoE layer ``layer`` will need, nearest first; x [..., H] is what its experts are given.

        To be called once for each call of the layer's experts, with all its tokens.
        """
        residual = self._caught.residuals.pop(layer, None)
        predictions, returned = [], {layer: self._caught.returned.pop(layer, None)}
        for step in self._plans[layer]:
            if step.affine is not None:
                x = step.affine(x_TH)
            elif residual is not None:
                x = residual if step.norm is None else step.norm.forward(residual)
            else:
                continue  # a fused layer that does not call its norm
            if step.router.extras and not self._knows(step.router.extras, returned):
                continue
            returned[step.layer] = made = step.router.returned(x, lambda extra: self._value(extra, returned))
            predictions.append(Prediction(step.layer, _ranked(*step.router.choice(made), step.router.num_experts)))
        return predictions

    def close(self) -> None:
        """Take the hooks off the model. Predictions end with them where they need them."""
        self._caught.release()

    def _plan(self, source: LayerRouting) -> list[_Step]:
        targets = self.routings[source.layer + 1 : source.layer + 1 + self.depth]
        return [self._step(source, target) for target in targets if _reach(source, target) == ""]

    def _step(self, source: LayerRouting, target: LayerRouting) -> _Step:
        assert target.router is not None
        return _Step(target.layer, target.router, _affine(source, target), target.norm)

    def _predicts(self, layer: int) -> bool:
        return any(step.layer == layer for plan in self._plans for step in plan)

    def _why_not(self, target: LayerRouting) -> str:
        return _reach(self.routings[target.layer - 1], target)

    def _catch_what_is_needed(self, model: nn.Module) -> None:
        for source, plan in zip(self.routings, self._plans, strict=True):
            if any(step.affine is None for step in plan):
                self._caught.catch_residual(source)
        extras = [extra for plan in self._plans for step in plan for extra in step.router.extras]
        if any(extra.kind == "token_ids" for extra in extras):
            self._caught.catch_token_ids(model.get_input_embeddings())  # type: ignore[operator]
        for layer in sorted({extra.value[0] for extra in extras if extra.kind == "output"}):
            self._caught.catch_returned(self.routings[layer])

    def _knows(self, extras: tuple[Extra, ...], returned: dict[int, Any]) -> bool:
        return all(
            (extra.kind != "output" or returned.get(extra.value[0]) is not None)
            and (extra.kind != "token_ids" or self._caught.token_ids is not None)
            for extra in extras
        )

    def _value(self, extra: Extra, returned: dict[int, Any]) -> Any:
        if extra.kind == "output":
            layer, position = extra.value
            return returned[layer][position]
        return self._caught.token_ids if extra.kind == "token_ids" else extra.value


class _Caught:
    """What hooks on a model's modules saw in the present step."""

    def __init__(self) -> None:
        self.residuals: dict[int, torch.Tensor] = {}
        self.returned: dict[int, Any] = {}
        self.token_ids: torch.Tensor | None = None
        self._handles: list[Any] = []

    def catch_residual(self, source: LayerRouting) -> None:
        assert source.router is not None
        slot = 0 if source.norm is not None else source.router.x_slot

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.residuals[source.layer] = args[slot] if isinstance(slot, int) else kwargs[slot]

        module = source.norm if source.norm is not None else source.router.module
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def catch_returned(self, source: LayerRouting) -> None:
        assert source.router is not None

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.returned[source.layer] = output

        self._handles.append(source.router.module.register_forward_hook(after))

    def catch_token_ids(self, embedding: nn.Module) -> None:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.token_ids = args[0]

        self._handles.append(embedding.register_forward_pre_hook(before))

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _affine(source: LayerRouting, target: LayerRouting) -> Affine | None:
    """From what the source's experts are given to what the target's router is given, for the same residual."""
    if not source.takes_experts_input:
        return None
    if source.norm is None and target.norm is None:
        return IDENTITY
    if source.norm is None or target.norm is None:
        return None
    assert source.residual is not None
    try:
        return find_affine(source.norm.forward, target.norm.forward, source.residual)
    except Exception:  # a norm that cannot be measured: it is run on the residual instead
        return None


def _reach(source: LayerRouting, target: LayerRouting) -> str:
    """Why a layer cannot predict for a later one; "" if it can."""
    if source.reason or target.reason:
        return target.reason or f"of the layer before it: {source.reason}"
    assert source.residual is not None and target.residual is not None
    if source.residual.shape[-1] != target.residual.shape[-1]:
        return f"its residual has {target.residual.shape[-1]} columns, that of the layer before it another number"
    return ""


def _ranked(ids_TK: torch.Tensor, weights_TK: torch.Tensor | None, num_experts: int) -> Ints:
    """Each expert once, by the sum of its weights; ids that are no experts are left out."""
    ids: Ints = ids_TK.reshape(-1).cpu().numpy()
    known = ids < num_experts
    weights = np.ones(len(ids), np.float32) if weights_TK is None else weights_TK.reshape(-1).float().cpu().numpy()
    totals = np.bincount(ids[known], weights[known], num_experts)
    chosen = np.flatnonzero(np.bincount(ids[known], minlength=num_experts))
    return chosen[np.argsort(-totals[chosen], kind="stable")]

"""A layer's router as something that can be asked at any time: for other hidden states than those that come by.

Most families have a router module whose output is what their experts are given. Where there is none the block around
the experts is asked, with something in place of its experts that only looks at what they are given.

Shapes: T tokens, K experts a token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from moray.runtime.model.attention_modules import replaced_forward

Slot = int | str  # position or keyword of an argument
Choice = tuple[torch.Tensor, torch.Tensor | None]  # ids, and weights of the same shape if known


@dataclass(frozen=True, slots=True, eq=False)
class Extra:
    """An argument beside the hidden states.

    ``constant``: ``value`` itself. ``token_ids``: the tokens of the step. ``output``: what the router of the layer
    ``value[0]`` returned at position ``value[1]``.
    """

    slot: Slot
    kind: Literal["constant", "token_ids", "output"]
    value: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """``module`` is a router, or the block around ``experts`` if ``is_block``.

    ``ids_at``, ``weights_at``: positions in what a router returns; -1 if not there.
    """

    module: nn.Module
    experts: nn.Module
    num_experts: int
    is_block: bool
    x_slot: Slot
    extras: tuple[Extra, ...]
    ids_at: int
    weights_at: int
    is_3d: bool  # takes [1, T, H], not [T, H]

    def shaped(self, x: torch.Tensor) -> torch.Tensor:
        x_TH = x.reshape(-1, x.shape[-1])
        return x_TH[None] if self.is_3d else x_TH

    def returned(self, x: torch.Tensor, extras: Callable[[Extra], Any]) -> tuple[Any, ...]:
        """What the router returns, hooks not called; for a block: ids and weights."""
        values: dict[Slot, Any] = {self.x_slot: self.shaped(x)} | {e.slot: extras(e) for e in self.extras}
        args = [values[slot] for slot in sorted(slot for slot in values if isinstance(slot, int))]
        kwargs = {slot: value for slot, value in values.items() if isinstance(slot, str)}
        if self.is_block:
            return self._ask_block(args, kwargs)
        return self.module.forward(*args, **kwargs)  # type: ignore[no-any-return]

    def choice(self, returned: tuple[Any, ...]) -> Choice:
        return returned[self.ids_at], returned[self.weights_at] if self.weights_at >= 0 else None

    def _ask_block(self, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        def look(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            raise _SeenError(ids, weights)

        try:
            with replaced_forward(self.experts, look):
                type(self.module).forward(self.module, *args, **kwargs)  # a fused one does not call its experts
        except _SeenError as seen:
            return seen.args
        raise AssertionError("the block did not call its experts")


class _SeenError(Exception):
    """Ends a block's forward; its arguments are ids and weights."""

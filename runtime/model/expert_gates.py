"""Which of the fused gates an experts module has. Nothing here lists families: the module's own gate is tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from moray.runtime.kernels.gates import SWIGLU, Gate

_WIDTH = 256
_TOLERANCE = 1e-6


def fused_gate(module: Any) -> Gate | None:
    """The gate that computes what the module's ``_apply_gate`` does, or None: then torch computes it.

    Both are applied to random values, small and well beyond any limit.
    """
    if not module.has_gate or module.has_post_expert_norm:
        return None
    generator = torch.Generator().manual_seed(0)
    candidates = list(_candidates(module))
    reach = 3 * max((gate.limit or 1.0 for gate in candidates), default=1.0)
    x = torch.randn(64, 2 * _WIDTH, generator=generator) * torch.logspace(-2, 0, 64)[:, None] * reach
    try:
        expected = module._apply_gate(x).float()
    except Exception:  # a gate that needs more than these values
        return None
    return next((gate for gate in candidates if _agree(apply_gate(gate, x), expected)), None)


def is_swiglu(module: Any) -> bool:
    """Whether these experts are down(silu(gate) * up), gates first, without biases."""
    return not module.has_bias and fused_gate(module) == SWIGLU


def apply_gate(gate: Gate, gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 I] -> [..., I] in torch: what the fused gate computes (kernels/gates.py)."""
    if gate.is_interleaved:
        g, u = gate_up[..., ::2], gate_up[..., 1::2]
    else:
        g, u = gate_up.chunk(2, dim=-1)
    if gate.limit is not None:
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    if gate.is_gelu:
        return torch.nn.functional.gelu(g, approximate="tanh") * u
    if gate.alpha is None:
        return torch.nn.functional.silu(g) * u
    return g * torch.sigmoid(g * gate.alpha) * (u + 1)


def _candidates(module: Any) -> Iterator[Gate]:
    yield SWIGLU
    yield Gate(is_gelu=True)
    limits = {float(value) for name, value in vars(module).items() if "limit" in name and _is_number(value)}
    alphas = {float(value) for name, value in vars(module).items() if "alpha" in name and _is_number(value)}
    for limit in sorted(limits):
        yield Gate(limit=limit)
        for alpha in sorted(alphas):
            yield Gate(limit=limit, alpha=alpha)
            yield Gate(limit=limit, alpha=alpha, is_interleaved=True)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE))

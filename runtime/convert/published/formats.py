"""Which of a checkpoint's tensors stand for which weight of the model.

A quantized weight comes in several tensors (codes, scales, zeros, ...). Here each set of them becomes one
``Published`` weight, with the name, shape and type that it would have in 16 bits, so that everything after it need
not know. Which sets there are follows from the tensors' names; ``quantization_config`` says how to read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moray.runtime.convert.published import awq, compressed, fp8, gptq, mxfp4
from moray.runtime.convert.published.headers import ADVICE, Headers
from moray.runtime.convert.published.settings import Settings
from moray.runtime.convert.published.weight import Published
from moray.runtime.convert.tensors import TensorEntry
from moray.runtime.errors import CheckpointError

_FORMATS: dict[str, Callable[[Headers], Iterator[tuple[str, Published]]]] = {
    "gptq": gptq.find,
    "awq": awq.find,
    "mxfp4": mxfp4.find,
    "fp8": fp8.find,
    "compressed-tensors": compressed.find,
}
#: Ends of the names of what belongs to quantized activations and caches.
_OF_ACTIVATIONS = (
    "activation_scale", "input_scale", "act_scale", "qscale_act", "input_zero_point", "input_global_scale",
    "output_scale", ".k_scale", ".v_scale", ".q_scale",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """Published weights by name; ``used``: keys that stand for nothing else; ``notes``: what is left out, in words."""

    weights: dict[str, Published] = field(default_factory=dict)
    used: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def find_published(root: Path, settings: Settings | None, tensors: Mapping[str, TensorEntry]) -> Found:
    """What a checkpoint has of quantized weights. Raises CheckpointError: unknown, incomplete, or of other shapes."""
    if settings is None:
        return Found()
    method = settings.method
    if method not in _FORMATS:
        raise CheckpointError(
            f"{root} is quantized already, with {method!r}; of pre-quantized checkpoints moray reads "
            f"{', '.join(_FORMATS)}: {ADVICE}"
        )
    weights = dict(_FORMATS[method](Headers(root, settings, tensors)))
    if not weights:
        raise CheckpointError(
            f"{root / 'config.json'} says that the checkpoint is pre-quantized with {method}, but none of its "
            "tensors is; delete quantization_config from it if the weights are in 16 bits, else download them again"
        )
    of_activations = [key for key in tensors if key.endswith(_OF_ACTIVATIONS)]
    used = frozenset(key for weight in weights.values() for key in weight.parts.values()) | frozenset(of_activations)
    twice = next((name for name in weights if name in tensors and name not in used), None)
    if twice:
        raise CheckpointError(
            f"{root} has {twice} both quantized and in 16 bits, expected one of them; download it again"
        )
    return Found(weights, used, tuple(_notes(settings, of_activations)))


def _notes(settings: Settings, of_activations: list[str]) -> Iterator[str]:
    groups = settings.get("config_groups")
    schemes = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    if settings.get("activation_scheme") or of_activations or any(s.get("input_activations") for s in schemes):
        yield (
            f"{settings.method}'s quantized activations ({'static' if of_activations else 'dynamic'}) are not used: "
            "activations are computed as the numerics class says"
        )

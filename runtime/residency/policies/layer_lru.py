"""Least recently used within each layer: "Fast Inference of Mixture-of-Experts Language Models with Offloading"
(arXiv 2312.17238), section 3.1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence


class LayerLRU:
    """Each layer has its share of the slots; an expert evicts the least recently used of its own layer.

    While slots are free any layer takes them. So a layer may be below its quota when all are taken: then the layer
    furthest above its own gives one up; of several, the one whose turn in the forward pass comes last.
    """

    def __init__(self, num_experts_of_layers: Sequence[int], num_slots: int) -> None:
        self._layer_of = [layer for layer, count in enumerate(num_experts_of_layers) for _ in range(count)]
        self._quotas = share_slots(num_experts_of_layers, num_slots)
        self._recency: list[OrderedDict[int, None]] = [OrderedDict() for _ in num_experts_of_layers]

    def loaded(self, expert: int) -> None:
        recency = self._recency[self._layer_of[expert]]
        recency[expert] = None
        recency.move_to_end(expert)

    def evicted(self, expert: int) -> None:
        self._recency[self._layer_of[expert]].pop(expert, None)

    def used(self, experts: list[int]) -> None:
        for expert in experts:
            recency = self._recency[self._layer_of[expert]]
            if expert in recency:
                recency.move_to_end(expert)

    def victim(self, incoming: int, may_evict: Callable[[int], bool]) -> int | None:
        layer = self._layer_of[incoming]
        if self._excess(layer) >= 0 and (found := self._oldest(layer, may_evict)) is not None:
            return found
        count = len(self._recency)
        others = sorted(range(count), key=lambda other: (-self._excess(other), (layer - other - 1) % count))
        return next((e for other in others if (e := self._oldest(other, may_evict)) is not None), None)

    def _excess(self, layer: int) -> int:
        return len(self._recency[layer]) - self._quotas[layer]

    def _oldest(self, layer: int, may_evict: Callable[[int], bool]) -> int | None:
        return next((expert for expert in self._recency[layer] if may_evict(expert)), None)


def share_slots(num_experts_of_layers: Sequence[int], num_slots: int) -> list[int]:
    """Equal shares, the first layers taking what does not divide; none is larger than its layer."""
    shares = [0] * len(num_experts_of_layers)
    while num_slots and (open_layers := [i for i, n in enumerate(num_experts_of_layers) if shares[i] < n]):
        share = num_slots // len(open_layers)
        for layer in open_layers if share else open_layers[:num_slots]:
            more = min(max(share, 1), num_experts_of_layers[layer] - shares[layer])
            shares[layer] += more
            num_slots -= more
    return shares

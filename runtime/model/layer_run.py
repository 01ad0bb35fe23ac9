"""Consecutive decoder layers in one launch, for one new token of a sequence or of each of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch

from moray.runtime.arrays import Ints
from moray.runtime.experts.function import ExpertsBinding
from moray.runtime.experts.meter import ExpertsMeter
from moray.runtime.experts.source import LeaseTable
from moray.runtime.kernels import layers as kernels
from moray.runtime.kernels.ops_fused import LayersKernel, batch_layers_at, layers_at
from moray.runtime.model.attention_modules import Rotation
from moray.runtime.model.batch_cache import RowsCache, RowsLayer
from moray.runtime.model.layer_modules import FusedBlock, FusedLayer


class LayerRun:
    """Called as a layer is; gives what its layers give one after the other.

    Those are called where a launch is not possible: while predictions are made or a trace is recorded, which look at
    every layer call, and where something else took the place of a fused forward, or hooks a layer. A layer whose block
    misses an expert is completed by itself, and the launch goes on after it.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._fused: list[FusedLayer] = [layer.forward for layer in layers]
        self._blocks: list[FusedBlock] = [layer.mlp.forward for layer in layers]
        self._forwards = [(vars(layer), fused) for layer, fused in zip(layers, self._fused, strict=True)]
        self._forwards += [(vars(layer.mlp), block) for layer, block in zip(layers, self._blocks, strict=True)]  # type: ignore[misc]
        self._hooks = [hooks for layer in layers for hooks in (layer._forward_hooks, layer._forward_pre_hooks)]
        self._bindings: list[ExpertsBinding] = [block.binding for block in self._blocks]
        self._places = [fused.attention.layer for fused in self._fused]  # in a cache
        parts = [(f.attention.kernel, f.norms, b.kernel) for f, b in zip(self._fused, self._blocks, strict=True)]
        self._kernel = LayersKernel.of(parts)
        self._columns = int(layers[0].input_layernorm.weight.numel())
        self._top_k = max(block.kernel.top_k for block in self._blocks)
        self._most_experts = max(binding.num_experts for binding in self._bindings)
        self._meter: ExpertsMeter | None = None
        self._tables: list[LeaseTable | None] = [None] * len(layers)

    def __call__(
        self, x: torch.Tensor, *, position_embeddings: Rotation, past_key_values: Any, **how: Any
    ) -> torch.Tensor:
        given = {"position_embeddings": position_embeddings, "past_key_values": past_key_values, **how}
        if not self._is_fused() or not self._take_leases():
            for layer in self._layers:
                x = layer(x, **given)
            return x
        return self._compute(x, position_embeddings, past_key_values)

    def _is_fused(self) -> bool:
        if any(self._hooks):
            return False
        return all(names.get("forward") is forward for names, forward in self._forwards)

    def _take_leases(self) -> bool:
        """Put the layers' leases into their rows; False if there is a layer that must be computed by itself."""
        meter = self._bindings[0].meter
        if meter is None:
            return False
        watch = self._bindings[0].watch
        if watch is not None and watch.wants_inputs:
            return False
        rows = self._kernel.rows
        for index, binding in enumerate(self._bindings):
            table = binding.source.table(binding.layer)
            if table is None or binding.watch is not watch or binding.meter is not meter:
                return False
            if table is not self._tables[index]:
                self._tables[index] = table  # kept: rows have its address
                at = table.columns.ctypes.data, len(table.columns)
                rows[index, kernels.LEASES : kernels.LEASE_COLUMNS + 1] = at
        if meter is not self._meter:
            self._meter = meter
            for index, binding in enumerate(self._bindings):
                counts = (meter.owners[binding.layer], meter.tokens[binding.layer])
                rows[index, kernels.OWNERS : kernels.TOKENS + 1] = [c.ctypes.data for c in counts]
        return True

    def _compute(self, x: torch.Tensor, rotation: Rotation, cache: Any) -> torch.Tensor:
        """``x`` [1, T, H]: new tokens, one of each row of ``cache``."""
        num_tokens, num_layers = x.shape[1], len(self._layers)
        cosines, sines = rotation[0].contiguous(), rotation[1].contiguous()
        rotary = (cosines.data_ptr(), sines.data_ptr(), cosines.shape[-1])
        launch = self._launch(cache)
        work = torch.empty(4, num_tokens, self._columns)  # two states, z and what a block gives
        states: Ints = np.array([work[0].data_ptr(), work[1].data_ptr()])
        attended = torch.empty(num_tokens * self._kernel.attended_floats)
        ids = torch.empty(num_tokens * self._top_k, dtype=torch.int64)
        weights = torch.empty(num_tokens * self._top_k)
        chosen = (ids.data_ptr(), weights.data_ptr())
        at = (states, attended.data_ptr(), work[2].data_ptr(), work[3].data_ptr(), chosen)
        uses: Ints = np.empty((num_layers, 1 + self._most_experts), dtype=np.int64)
        work[0] = x[0]
        index, meter = 0, self._meter
        assert meter is not None
        while True:
            first = index
            index = meter.time_layers(first, uses, lambda first, counts: launch(first, rotary, at, counts))
            self._tell(uses[first:index], self._bindings[first:index], num_tokens)
            if index == num_layers:
                return work[index % 2].view(x.shape)
            work[(index + 1) % 2] += self._complete(self._blocks[index], work[2], ids, weights)
            index += 1

    def _launch(self, cache: Any) -> Callable[..., int]:
        """``layers_at`` or ``batch_layers_at``, with room for the new tokens in every layer's cache."""
        if isinstance(cache, RowsCache):
            rows = [cast(RowsLayer, cache.layers[place]).extend_rows() for place in self._places]
            caches = np.stack(rows)
            return lambda first, rotary, at, counts: batch_layers_at(self._kernel, first, rotary, caches, at, counts)
        length = self._extend(cache)
        return lambda first, rotary, at, counts: layers_at(self._kernel, first, rotary, length, at, counts)

    def _extend(self, cache: Any) -> int:
        """Room for the token in every layer's cache. Returns the length with it."""
        places = []
        for place in self._places:
            keys, values = cache.layers[place].extend(1)
            places.append((keys.data_ptr(), values.data_ptr(), 4 * keys.stride(1)))
        self._kernel.rows[:, kernels.KEYS : kernels.HEAD_BYTES + 1] = places
        return int(keys.shape[-2])

    def _tell(self, uses: Ints, bindings: Sequence[ExpertsBinding], num_tokens: int) -> None:
        """What layers have used."""
        watch = self._bindings[0].watch
        if watch is None:
            return
        most = int(uses[:, 0].max(initial=0))
        for binding, (count, *experts) in zip(bindings, uses[:, : 1 + most].tolist(), strict=True):
            watch.used(binding.layer, num_tokens, experts[:count])

    def _complete(
        self, block: FusedBlock, z_TH: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What the experts of a layer give that were chosen, but are not all there."""
        shape = len(z_TH), block.kernel.top_k
        ids_TK, weights_TK = (flat[: shape[0] * shape[1]].view(shape) for flat in (ids, weights))
        return block.binding.forward(block.experts, z_TH, ids_TK, weights_TK)


def join_layers(layers: Sequence[Any]) -> list[Any]:
    """What to call in place of layers, one after the other: runs of fused ones, and the others themselves."""
    joined: list[Any] = []
    run: list[Any] = []
    for layer in [*layers, None]:
        if layer is not None and _is_fused(layer):
            run.append(layer)
            continue
        if run:
            joined.append(LayerRun(run))
        run = []
        if layer is not None:
            joined.append(layer)
    return joined


def _is_fused(layer: Any) -> bool:
    block = getattr(getattr(layer, "mlp", None), "forward", None)
    return isinstance(layer.forward, FusedLayer) and isinstance(block, FusedBlock)

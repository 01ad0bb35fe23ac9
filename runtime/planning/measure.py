"""Measuring a model's profile: its own forward on the meta device, which computes shapes and allocates nothing.

    python -m moray.runtime.planning.measure STORE cpu

Nothing here knows families: a cache is whatever a model's forward leaves in it, and the workspace is the most that
its operations hold at once. Operations whose result depends on values give the largest result they could.
"""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from moray.runtime.errors import MorayError
from moray.runtime.experts.function import IMPLEMENTATION
from moray.runtime.generation.kv import KVCache
from moray.runtime.model.batch import BatchForward
from moray.runtime.model.batch_cache import can_be_padded
from moray.runtime.model.families import build_model, context_length, expert_modules, load_config
from moray.runtime.model.kv_layer import new_cache
from moray.runtime.model.loader import compute_dtype
from moray.runtime.model.weights_read import dequantized_bytes, trunk_bytes, trunk_bytes_read
from moray.runtime.planning.profile import CHUNKS, ModelProfile, SequenceMemory, Workspace
from moray.runtime.store.manifest import ExpertsLayer
from moray.runtime.store.store import Store

_BLOCK = 128  # tokens: a multiple of the blocks in which families compress their caches
_WHOLE_PROMPTS = (64, 128, 256)  # lengths at which models are measured that take whole prompts
_MAX_LENGTH = 1 << 22
_ATEN: Any = torch.ops.aten
_CPU = torch.device("cpu")


def measure_profile(store: Store, device: torch.device = _CPU) -> ModelProfile:
    """The profile of a store's model on a device. Raises what ``load_config`` and ``build_model`` raise."""
    dtype = compute_dtype(device)
    model = build_model(load_config(store.path), dtype, "meta")
    experts = [
        _Experts(layer, module) for layer, (_, module) in zip(store.manifest.layers, expert_modules(model), strict=True)
    ]
    trial = _Trial(model)
    sequence = _sequence_memory(trial)
    workspace = _workspace(trial, sequence, experts)
    if device.type != "cpu":
        workspace = replace(workspace, constant=workspace.constant + dequantized_bytes(store.manifest, dtype))
    config = model.config.get_text_config()
    return ModelProfile(
        trunk_bytes(model, store.manifest, device.type),
        context_length(config),
        sequence,
        workspace,
        trunk_bytes_read(model, store.manifest, device.type),
        _experts_per_token(experts),
    )


def _experts_per_token(experts: list[_Experts]) -> tuple[int, ...]:
    """By layer. Layers that were not computed, because one before them is like them, have as many as any other."""
    most = max(layer.top_k for layer in experts)
    return tuple(layer.top_k or most for layer in experts)


class _Experts:
    """In place of a layer's experts: their result's shape, and the scratch that computing it takes."""

    def __init__(self, layer: ExpertsLayer, module: nn.Module) -> None:
        specs = {t.name: t.spec for t in layer.layout.tensors if t.spec is not None}
        up, down = specs["gate_up_proj"] if "gate_up_proj" in specs else specs["up_proj"], specs["down_proj"]
        # Panels of activations, in the larger class, and results before and after the gate: ops.LayerKernel.
        self._pair_bytes = 4 * (up.columns + 2 * up.rows + 2 * down.columns + 2 * down.rows)
        self.scratch_per_token = self.top_k = 0
        module.moray = self  # type: ignore[assignment]
        module.config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]

    def forward(self, module: nn.Module, x_TH: torch.Tensor, ids_TK: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        self.top_k = ids_TK.shape[-1]
        self.scratch_per_token = self._pair_bytes * self.top_k
        return torch.empty_like(x_TH)


class _Trial:
    """Forward passes of a model on the meta device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config.get_text_config()
        self._model = model
        cache, _ = self.feed(None, 5)
        self._kind: type[DynamicCache] = type(cache)
        is_usual = self._kind is DynamicCache  # else nothing is known of its layers
        #: Layer -> the first layer like it, whose cache stands for its own.
        self.alike = _skip_repeated_layers(model, len(cache.layers)) if is_usual else {}

    def cache(self, tokens: int) -> DynamicCache:
        return new_cache(self.config, self._kind, tokens)

    def can_batch(self) -> bool:
        """Whether one pass over two sequences of different lengths runs. What it gives is tried in a loaded model."""
        caches = [self.feed(self.cache(tokens + 1), tokens)[0] for tokens in (2, 5)]
        if self._kind is not DynamicCache or not can_be_padded(caches[0]):
            return False
        try:
            with torch.no_grad(), _MetaAttention(), _LiveBytes():
                BatchForward(self._model, "padded")([0, 0], caches)
        except Exception:  # modules that look into a cache of their own kind
            return False
        return True

    @torch.no_grad()  # not inference mode, in which composite operations are not seen one by one
    def feed(self, cache: DynamicCache | None, *steps: int) -> tuple[Any, int]:
        """Feed so many tokens in each pass. Returns the cache, and the most that the last pass held at once."""
        with _MetaAttention(), _LiveBytes() as live:
            for tokens in steps:
                live.peak = live.now
                ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
                keep: dict[str, Any] = {} if cache is None else {"past_key_values": cache, "logits_to_keep": 1}
                output = self._model(input_ids=ids, use_cache=True, **keep)
                cache = output.past_key_values
                del output
        return cache, live.peak


def _skip_repeated_layers(model: PreTrainedModel, num_layers: int) -> dict[int, int]:
    """Let each kind of decoder layer be computed once: those that differ in their index only give what it gave."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != num_layers:
        return {}
    first: dict[Any, int] = {}
    alike = {index: first.setdefault(_kind_of(layer), index) for index, layer in enumerate(layers)}
    results: dict[int, Any] = {}
    for index, layer in enumerate(layers):
        layer.forward = _kept(layer.forward, results, index) if alike[index] == index else _again(results, alike[index])
    return alike


def _kept(forward: Any, results: dict[int, Any], index: int) -> Any:
    def keeping(*args: Any, **kwargs: Any) -> Any:
        results[index] = forward(*args, **kwargs)
        return results[index]

    return keeping


def _again(results: dict[int, Any], index: int) -> Any:
    return lambda *args, **kwargs: results[index]


def _kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """Everything that makes layers compute differently: classes, plain attributes, shapes."""
    plain = (int, float, str, bool, type(None))
    modules = []
    for name, module in layer.named_modules():
        values = {key: value for key, value in vars(module).items() if isinstance(value, plain) and key != "layer_idx"}
        modules.append((name, type(module), *sorted(values.items())))
    return (*modules, *((name, *parameter.shape) for name, parameter in layer.named_parameters()))


def _sequence_memory(trial: _Trial) -> SequenceMemory:
    """From caches of a few lengths. What is more than one number a token is counted as a constant, at its largest."""
    lengths = (1, _BLOCK - 1, _BLOCK, 2 * _BLOCK - 1, 2 * _BLOCK)
    filled = {tokens: trial.feed(trial.cache(tokens), tokens)[0] for tokens in lengths}
    bytes_at = {tokens: _layer_bytes(cache, trial.alike) for tokens, cache in filled.items()}
    slopes = _per_token(bytes_at[_BLOCK], bytes_at[2 * _BLOCK])
    can_chunk = KVCache(filled[1], []).can_chunk
    windows = _windows(filled[1]) if can_chunk else {}
    if windows:
        # Beyond the window such a layer may still keep something of every token.
        far = 2 * max(windows.values())
        ends = [trial.feed(trial.cache(n + 1), n, 1)[0] for n in (far, far + _BLOCK)]
        beyond = _per_token(*(_layer_bytes(cache, trial.alike) for cache in ends))
        kept = {layer: beyond[layer] for layer in windows}
    else:
        kept = {}
    fixed = max(sum(sizes.values()) - sum(slopes.values()) * tokens for tokens, sizes in bytes_at.items())
    return SequenceMemory(
        fixed_bytes=max(0, fixed),
        bytes_per_token=sum(kept.get(layer, slope) for layer, slope in slopes.items()),
        windows=_joined((windows[layer], slopes[layer] - kept[layer]) for layer in windows),
        can_chunk=can_chunk,
        can_batch=trial.can_batch(),
    )


def _per_token(before: dict[int, int], after: dict[int, int]) -> dict[int, int]:
    """Bytes a token, by layer, of caches that differ by a block of tokens; rounded up."""
    return {layer: -((before.get(layer, 0) - size) // _BLOCK) for layer, size in after.items()}


def _windows(cache: Any) -> dict[int, int]:
    """Layer -> the tokens it keeps, for layers that keep the last ones only.

    A family's own kind may also keep those of a block that is not complete.
    """
    return {
        index: max(int(layer.sliding_window), 0 if type(layer) is DynamicSlidingWindowLayer else _BLOCK)
        for index, layer in enumerate(cache.layers)
        if getattr(layer, "is_sliding", False) and getattr(layer, "sliding_window", None)
    }


def _joined(windows: Any) -> tuple[tuple[int, int], ...]:
    total: dict[int, int] = {}
    for tokens, size in windows:
        total[tokens] = total.get(tokens, 0) + size
    return tuple(sorted(total.items()))


def _layer_bytes(cache: Any, alike: dict[int, int]) -> dict[int, int]:
    """Bytes of the storages behind a cache's tensors, by layer; -1: what belongs to none. Each storage once."""
    seen: set[int] = set()
    found = {index: _storage_bytes(layer, seen) for index, layer in enumerate(cache.layers)}
    return {index: found[alike.get(index, index)] for index in found} | {-1: _storage_bytes(cache, seen)}


def _storage_bytes(value: object, seen: set[int]) -> int:
    if id(value) in seen or isinstance(value, type | torch.dtype):
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        is_new = storage._cdata not in seen
        seen.add(storage._cdata)
        return storage.nbytes() if is_new else 0
    if isinstance(value, dict):
        return sum(_storage_bytes(part, seen) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(_storage_bytes(part, seen) for part in value)
    return _storage_bytes(vars(value), seen) if hasattr(value, "__dict__") else 0


# ----------------------------------------------------------------------------------- workspace


def _workspace(trial: _Trial, sequence: SequenceMemory, experts: list[_Experts]) -> Workspace:
    """Through measured points. What a pass holds is convex in its tokens and in the length: in between it is less."""
    scratch = max(layer.scratch_per_token for layer in experts)
    if not sequence.can_chunk:
        points = [(tokens, tokens) for tokens in _WHOLE_PROMPTS]
    else:
        longest = min(max(context_length(trial.config), 2 * CHUNKS[-1]), _MAX_LENGTH)
        points = [(tokens, length) for tokens in (CHUNKS[0], CHUNKS[-1]) for length in (CHUNKS[-1], longest)]
    held = []
    for tokens, length in points:
        steps = (length - tokens, tokens) if length > tokens else (tokens,)
        cache, peak = trial.feed(trial.cache(length), *steps)
        held.append(peak - sum(_layer_bytes(cache, {}).values()) + scratch * tokens)
    if not sequence.can_chunk:
        constant, per_token, per_pair = np.linalg.solve([[1, n, n * n] for n, _ in points], held)
        return Workspace(float(constant), float(per_token), 0.0, float(max(0, per_pair)))
    return Workspace(*np.linalg.solve([[1, t, n, t * n] for t, n in points], held).tolist())


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make and nobody has dropped yet."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._living: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _largest_result(func, args)
        if out is None:
            out = func(*_with_largest_index(func, args), **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.is_meta:
                self._note(value.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._living:
            self._living.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._living.discard(key)
        self.now -= size


def _largest_result(func: Any, args: Any) -> Any:
    """What an operation could give at most whose result depends on values; None for all others."""
    if func is _ATEN.nonzero.default:
        return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
    if func is _ATEN._local_scalar_dense.default:
        return False if args[0].dtype == torch.bool else 0
    return None


def _with_largest_index(func: Any, args: Any) -> Any:
    """A mask as an index takes as many elements as it has."""
    if func is not _ATEN.index.Tensor:
        return args
    indices: list[Any] = []
    for index in args[1]:
        is_mask = index is not None and index.dtype == torch.bool
        indices += [torch.empty(index.numel(), dtype=torch.long, device="meta")] * index.ndim if is_mask else [index]
    return args[0], indices


class _MetaAttention(TorchFunctionMode):
    """torch's attention without the scores of every pair, where its implementation holds but a few of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and _is_flash(*args, **kwargs):
            query, value = args[0], args[2]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **kwargs)


def _is_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, **kwargs: Any) -> bool:
    """Whether torch has the lean implementation for these heads: asked with a few tokens on the CPU."""
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        few = [torch.zeros(*t.shape[:-2], 4, t.shape[-1], dtype=t.dtype) for t in (q, k, v)]
        mask = None if attn_mask is None else torch.ones(1, 1, 4, 4, dtype=torch.bool)
        is_causal = bool(kwargs.get("is_causal")) and mask is None
        choose: Any = torch._fused_sdp_choice
        choice = choose(*few, mask, 0.0, is_causal, enable_gqa=bool(kwargs.get("enable_gqa")))
    return int(choice) != 0


def main(store_path: str, device: str) -> None:
    """Print a profile as JSON, or an error as its class's name and its message."""
    try:
        with Store.open(store_path) as store:
            print(measure_profile(store, torch.device(device)).encode())
    except MorayError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))


if __name__ == "__main__":
    main(*sys.argv[1:])

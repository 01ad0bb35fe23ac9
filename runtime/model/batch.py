"""One forward pass for new tokens of several sequences.

Two ways, neither for listed families; a model gets the first one that agrees with its own single steps in a trial:

- *fused*: attention modules that are fused (attention_modules.py) take all rows at once, each over its own cache
  where it lies; everything else of a model is the same for every token, so it sees rows as if they were one sequence.
- *padded*: transformers' own layers see a batch whose shorter sequences are padded on the left, as ``generate``
  does it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from transformers import DynamicCache

from moray.runtime.model.attention_modules import is_all_fused, replaced_forward
from moray.runtime.model.batch_cache import PaddedCache, RowsCache, can_be_padded
from moray.runtime.model.kv_layer import new_cache

BatchKind = Literal["fused", "padded"]

_TRIAL = ([1, 2, 3], [4, 5, 6, 7, 8])  # two prompts
_TOLERANCE = {torch.float32: 1e-4}  # of the largest logit
_HALF_TOLERANCE = 3e-2


class BatchForward:
    """Logits of rows: a row is a new token and the cache of its sequence, to which the token is appended.

    ``kind``: "fused" computes each row with the bits it has alone wherever the kernels compute it, "padded" within
    rounding. ``takes_runs``: whether a cache may be named in several rows, which are then consecutive tokens of its
    sequence; else each may be named once.

    Called by the step loop's thread only, in inference mode. Every cache is of the model's own kind and holds at least
    one token. After an error the caches that were given are of no more use.
    """

    def __init__(self, model: Any, kind: BatchKind) -> None:
        self._model, self.kind = model, kind
        self._rotary = [module for module in model.modules() if _depends_on_length(module)]

    @property
    def takes_runs(self) -> bool:
        return self.kind == "fused"

    def __call__(self, tokens: Sequence[int], caches: Sequence[DynamicCache]) -> torch.Tensor:
        """Logits [B, V] of B rows: ``tokens[i]`` is appended to ``caches[i]``, in this order."""
        assert len(tokens) == len(caches) > 0
        device, is_fused = self._model.device, self.kind == "fused"
        rows: Any = RowsCache(caches) if is_fused else _padded_cache(caches)
        shape = (1, -1) if is_fused else (-1, 1)
        ids, positions = (torch.tensor(values, device=device).view(shape) for values in (list(tokens), rows.positions))
        mask = None if is_fused else rows.mask.to(device)
        with self._rotating_rows(dim=1 if is_fused else 0):
            logits: torch.Tensor = self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=rows, use_cache=True
            ).logits
        if not is_fused:
            rows.put_back()
        return logits.flatten(0, 1)

    @contextmanager
    def _rotating_rows(self, dim: int) -> Iterator[None]:
        """Rotations that depend on the longest sequence of a batch are made row by row meanwhile."""
        with ExitStack() as stack:
            for module in self._rotary:
                stack.enter_context(replaced_forward(module, _row_by_row(module.forward, dim)))
            yield


@torch.inference_mode()
def cache_kind_of(model: Any) -> type[DynamicCache]:
    """The kind of cache that a model makes for itself. Computes a step of one token."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    return type(model(input_ids=ids, use_cache=True).past_key_values)


@torch.inference_mode()
def make_batch_forward(model: Any, cache_kind: type[DynamicCache]) -> BatchForward | None:
    """A batched forward pass of a loaded causal language model, its experts bound. ``cache_kind``: ``cache_kind_of``.

    None: what was tried differs from the model's own single steps, or its caches are of other kinds than are known
    here; then sequences are to be served in turn. Computes a few steps: bind blank experts meanwhile
    (``loader.blank_experts``), or they are loaded and counted.
    """
    if cache_kind is not DynamicCache:
        return None
    try:
        caches = [_prefilled(model, prompt) for prompt in _TRIAL]
    except Exception:  # a model that is called in another way
        return None
    if not all(can_be_padded(cache) for cache in caches):
        return None
    kinds: list[BatchKind] = ["fused"] if model.device.type == "cpu" and is_all_fused(model) else []
    for kind in (*kinds, "padded"):
        batch = BatchForward(model, kind)
        if _agrees(batch, model, caches):
            return batch
    return None


def describe_batch(batch: BatchForward | None) -> str:
    """ "fused", "padded" or "in turn", for people."""
    return "in turn" if batch is None else batch.kind


def _padded_cache(caches: Sequence[DynamicCache]) -> PaddedCache:
    assert len({id(cache) for cache in caches}) == len(caches), "a sequence has one row in a padded batch"
    return PaddedCache(caches)


def _depends_on_length(module: Any) -> bool:
    """Whether a module's rotations depend on how many tokens there are."""
    kinds = getattr(module, "rope_type", None)
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in names)


def _row_by_row(plain: Any, dim: int) -> Any:
    def forward(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        made = [plain(x, row, *args, **kwargs) for row in position_ids.split(1, dim)]
        return tuple(torch.cat(parts, dim) for parts in zip(*made, strict=True))

    return forward


def _prefilled(model: Any, prompt: list[int]) -> DynamicCache:
    """A cache with a prompt in it."""
    cache = new_cache(model.config.get_text_config())
    model(input_ids=torch.tensor([prompt], device=model.device), past_key_values=cache, use_cache=True)
    return cache


def _agrees(batch: BatchForward, model: Any, caches: Sequence[Any]) -> bool:
    """Whether one batch gives the logits and the caches that single steps give."""
    its, mine = copy.deepcopy(caches), copy.deepcopy(caches)
    order = [0, 1, 1] if batch.takes_runs else [1, 0]
    tokens = [9, 10, 11][: len(order)]
    try:
        wanted = [_step(model, token, its[sequence]) for token, sequence in zip(tokens, order, strict=True)]
        got = batch(tokens, [mine[sequence] for sequence in order])
    except Exception:  # modules that take something else
        return False
    pairs = [(got, torch.cat(wanted))]
    for one, other in zip(mine, its, strict=True):
        for a, b in zip(one.layers, other.layers, strict=True):
            pairs += [(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True)]
    return all(_are_close(a, b) for a, b in pairs)


def _tensors(layer: Any) -> list[torch.Tensor]:
    """What a layer of a cache holds."""
    found = []
    for name, value in vars(layer).items():
        values = value.values() if isinstance(value, dict) else [] if name.startswith("_") else [value]
        found += [v for v in values if torch.is_tensor(v) and v.is_floating_point()]
    return found


def _step(model: Any, token: int, cache: Any) -> torch.Tensor:
    ids = torch.tensor([[token]], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
    return logits


def _are_close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    if got.shape != wanted.shape:
        return False
    tolerance = _TOLERANCE.get(wanted.dtype, _HALF_TOLERANCE)
    return got.numel() == 0 or bool((got - wanted).abs().max() <= tolerance * wanted.abs().max())

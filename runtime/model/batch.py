"""One forward pass for new tokens of several sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import DynamicCache

BatchKind = Literal["fused", "padded"]


class BatchForward:
    """Logits of rows: a row is a new token and the cache of its sequence, to which the token is appended.

    ``kind``: "fused" computes each row with the bits it has alone, "padded" within rounding.
    ``takes_runs``: whether rows of one sequence may follow each other, as consecutive tokens of it; otherwise each
    cache may be named once.
    Called by the step loop's thread only, in inference mode. Every cache holds at least one token.
    """

    def __init__(self, model: Any, kind: BatchKind, takes_runs: bool) -> None:
        self._model, self.kind, self.takes_runs = model, kind, takes_runs

    def __call__(self, tokens: Sequence[int], caches: Sequence[DynamicCache]) -> torch.Tensor:
        """float32 [len(tokens), V]; ``caches[i]`` is appended ``tokens[i]``, in this order."""
        rows = []
        for token, cache in zip(tokens, caches, strict=True):
            ids = torch.tensor([[token]], device=self._model.device)
            rows.append(self._model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0])
        return torch.cat(rows)


def make_batch_forward(model: Any) -> BatchForward | None:
    """A batched forward pass of a loaded causal language model, its experts bound; None if none agrees with the
    model's own steps, tried on a few tokens: then sequences are served in turn.

    It computes a few steps: bind blank experts meanwhile (``loader.blank_experts``).
    """
    return BatchForward(model, "fused", takes_runs=True)


def describe_batch(batch: BatchForward | None) -> str:
    """ "fused", "padded" or "in turn", for people."""
    return "in turn" if batch is None else batch.kind

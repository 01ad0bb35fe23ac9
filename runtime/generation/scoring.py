"""From logits to log-probabilities, a few rows at a time: a vocabulary may have more than 150,000 tokens."""

from __future__ import annotations

import numpy as np
import torch

from moray.runtime.evaluation import NUM_TOP_TOKENS, Ids, TokenScores

_SLICE_ELEMENTS = 1 << 20  # float32 [rows, V] of 4 MiB; three of them exist at a time


@torch.inference_mode()
def score_logits(logits: torch.Tensor, next_ids: Ids, candidates: Ids | None = None) -> TokenScores:
    """Scores of a window of T tokens, from ``logits`` [T-1, V] of any float type on any device.

    ``next_ids`` [T-1] are the tokens that follow, ``candidates`` [T-1, K] those whose log-probabilities are wanted.
    """
    length, vocabulary_size = logits.shape
    num_top = min(NUM_TOP_TOKENS, vocabulary_size)
    # Made before the slices: small arrays that are kept among large ones that are not would fragment the heap.
    scores = TokenScores(
        next_log_probs=np.empty(length, np.float32),
        top_ids=np.empty((length, num_top), np.int32),
        top_log_probs=np.empty((length, num_top), np.float32),
        top_rest=np.empty(length, np.float32),
        candidate_log_probs=None if candidates is None else np.empty(candidates.shape, np.float32),
        candidate_rest=None if candidates is None else np.empty(length, np.float32),
    )
    step = max(1, _SLICE_ELEMENTS // vocabulary_size)
    for start in range(0, length, step):
        rows = slice(start, start + step)
        log_probs = torch.log_softmax(logits[rows].float(), dim=-1)
        scores.next_log_probs[rows] = log_probs.gather(-1, _indices(next_ids[rows, None], log_probs))[:, 0].cpu()
        top = log_probs.topk(num_top, dim=-1)
        scores.top_ids[rows], scores.top_log_probs[rows] = top.indices.cpu(), top.values.cpu()
        scores.top_rest[rows] = _rest(log_probs, top.indices)
        if candidates is not None:
            assert scores.candidate_log_probs is not None and scores.candidate_rest is not None
            ids = _indices(candidates[rows], log_probs)
            scores.candidate_log_probs[rows] = log_probs.gather(-1, ids).cpu()
            scores.candidate_rest[rows] = _rest(log_probs, ids)
    return scores


def _rest(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[rows] log of what all tokens but ``ids`` [rows, K] have together."""
    return log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1).cpu()


def _indices(ids: Ids, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(ids.astype(np.int64)).to(like.device)

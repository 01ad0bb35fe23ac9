"""How well a model predicts a text, and how closely it follows a reference: windows, perplexity, agreement.

Definitions, for every place that prints these numbers:

- A text is one document: all its tokens, with those that the tokenizer adds. It is cut into windows of W tokens without
  overlap; a shorter last window counts if it has at least 2 tokens. Each window is one forward pass of its own, so its
  first token is context only, and its others are *predicted*.
- Perplexity is exp of the mean negative log-likelihood (NLL, nats) of the predicted tokens. The mean's standard error
  treats tokens as independent draws. Perplexities of different vocabularies or texts do not compare.
- Agreement with a reference compares the distributions of the next token at each predicted position. *Same top token*
  is the share of positions whose most likely token is the same. *KL divergence* is KL(reference || store) in nats,
  exact over the reference's 64 most likely tokens plus one bucket with the rest of the mass, and its mean is reported.
  The bucket makes it a lower bound of the divergence over the whole vocabulary.

NumPy only: processes that talk to an engine use it without loading torch. Legend: T tokens of a window, K top tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moray.runtime.arrays import Doubles, Floats
from moray.runtime.errors import EvaluationError

NUM_TOP_TOKENS = 64

Ids = npt.NDArray[np.int32]  # halves what is kept of a reference


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities (natural) that a model gives in a window of T tokens. Row t is about token t + 1.

    ``rest`` are the log-probabilities of all tokens that are not among the K of the same row, together.
    """

    next_log_probs: Floats  # [T-1], of the token that follows
    top_ids: Ids  # [T-1, K], most likely first; K is NUM_TOP_TOKENS, or a smaller vocabulary
    top_log_probs: Floats  # [T-1, K]
    top_rest: Floats  # [T-1]
    candidate_log_probs: Floats | None = None  # [T-1, K], of the tokens that were asked for
    candidate_rest: Floats | None = None  # [T-1]


def cut_windows(ids: Sequence[int], length: int) -> Iterator[list[int]]:
    """Windows of ``length`` tokens without overlap; the last may be shorter, but has at least 2."""
    for start in range(0, len(ids) - 1, length):
        yield list(ids[start : start + length])


def kl_divergences(reference: TokenScores, scores: TokenScores) -> Doubles:
    """[T-1] KL(reference || scores) in nats, over the reference's top tokens and one bucket for the rest.

    The candidates of ``scores`` must be the reference's top tokens.
    """
    assert scores.candidate_log_probs is not None and scores.candidate_rest is not None
    log_p = np.column_stack((reference.top_log_probs, reference.top_rest)).astype(np.float64)
    log_q = np.column_stack((scores.candidate_log_probs, scores.candidate_rest)).astype(np.float64)
    possible = log_p > -np.inf  # p log(p / q) is 0 where p is 0: the rest of a vocabulary that has no more than K
    difference = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=possible)
    divergences: Doubles = np.sum(np.exp(log_p) * difference, axis=1)
    return divergences


class Evaluation:
    """What windows said so far about one store: sums in float64, means on demand."""

    def __init__(self) -> None:
        self.num_predicted = 0
        self._nll, self._nll_squares = 0.0, 0.0
        self._num_compared, self._num_same_top, self._kl = 0, 0, 0.0

    def add(self, scores: TokenScores, reference: TokenScores | None = None) -> None:
        """Count one window, compared with the reference's scores of the same window if they are given.

        Raises EvaluationError if a log-probability is not finite: no mean could be taken of it.
        """
        nll = -scores.next_log_probs.astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(nll))
        if len(bad):
            raise EvaluationError(
                f"the log-probability of token {bad[0] + 1} of a window is {-nll[bad[0]]}, expected a finite number; "
                "check the store with `moray info --verify`, then the checkpoint it was made from"
            )
        self.num_predicted += len(nll)
        self._nll += float(nll.sum())
        self._nll_squares += float(np.square(nll).sum())
        if reference is not None:
            self._num_compared += len(nll)
            self._num_same_top += int(np.sum(scores.top_ids[:, 0] == reference.top_ids[:, 0]))
            self._kl += float(kl_divergences(reference, scores).sum())

    @property
    def mean_nll(self) -> float:
        """Nats a token."""
        return self._nll / self.num_predicted

    @property
    def nll_standard_error(self) -> float | None:
        """Of ``mean_nll``, in nats; None for a single token."""
        if self.num_predicted < 2:
            return None
        variance = max(0.0, self._nll_squares / self.num_predicted - self.mean_nll**2)
        return math.sqrt(variance / (self.num_predicted - 1))

    @property
    def perplexity(self) -> float:
        """Infinite where a float cannot hold it."""
        return math.exp(self.mean_nll) if self.mean_nll < math.log(np.finfo(np.float64).max) else math.inf

    @property
    def same_top_share(self) -> float | None:
        """From 0 to 1; None without a reference."""
        return self._num_same_top / self._num_compared if self._num_compared else None

    @property
    def mean_kl(self) -> float | None:
        """Nats a token; None without a reference."""
        return self._kl / self._num_compared if self._num_compared else None

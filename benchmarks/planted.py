"""Weights that make a random model choose given experts at each token, and walk from token id t to t + 1.

The first D hidden dimensions are reserved: nothing but the embedding writes them (rows of the attention's output matrix
and of the experts' down matrices are zero there), so a token keeps them through all layers, up to the norms' factor.
- *Router blocks*: E dimensions for each layer, which its router alone reads: row e of its matrix is 1 at dimension e of
  the block and 0 elsewhere. The embedding of token t has the largest values at the experts that t is to choose, in
  their order, and at least three levels less elsewhere: no rounding of activations can change which are the largest.
- *Position code*: a random sign in each of some dimensions. Row t + 1 of the head is token t's code, and zero in all
  other dimensions, so that the largest logit after t is t + 1, far ahead of the next.

All these values are small whole *levels* times a power of two, which 4-bit weights with an integer zero hold exactly:
the store and the GGUF file have the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
from replay import Replay

Levels = npt.NDArray[np.int8]
RowsOf = Callable[[int, int], Levels]  # first row, count -> [count, D]
Role = Literal["embedding", "head", "router", "output", "other"]

#: What a tensor's name on the hub or in GGUF says that it is; ``output`` matrices write the residual stream.
_ROLES: tuple[tuple[str, Role], ...] = (
    (r"model\.embed_tokens\..*|token_embd\..*", "embedding"),
    (r"lm_head\..*|output\.weight", "head"),
    (r"model\.layers\.(\d+)\.\w+\.gate\.weight|blk\.(\d+)\.ffn_gate_inp\.weight", "router"),
    (r".*\.o_proj\..*|.*\.attn_output\..*|.*\.ffn_down_exps\..*", "output"),
)

UNIT = 0.25  # of the embedding's levels: they are as large as its other values, of std 1
HEAD_UNIT = 1 / 64
_TOP_LEVEL, _REST_LEVEL = 7, -3  # of the first choice; the largest of what is not chosen
_CODE_LEVEL = 4
_ALIGNMENT = 64  # dimensions: whole groups of quantization
_MAX_CODE_DIMS = 256
_MAX_LIKENESS = 0.75  # of two tokens' codes


class Planted:
    """What a model's reserved dimensions hold. V is the number of token ids, D that of reserved dimensions."""

    def __init__(self, replay: Replay, hidden: int, *, seed: int = 0) -> None:
        self._chosen = replay.chosen_TLK
        self.num_tokens, self.layers, self.active = self._chosen.shape
        self.experts, self.hidden = replay.experts, hidden
        router_dims = _round_up(self.layers * self.experts)
        self._first_code = router_dims
        code_dims = min(_MAX_CODE_DIMS, (hidden - router_dims) // 2 // _ALIGNMENT * _ALIGNMENT)
        if code_dims < _ALIGNMENT:
            raise SystemExit(
                f"{self.layers} layers of {self.experts} experts reserve {router_dims} dimensions, and a position code "
                f"as well; hidden {hidden} is too small: fewer layers"
            )
        if self.active > _TOP_LEVEL + 1:
            raise SystemExit(f"{self.active} experts a token; levels are enough for {_TOP_LEVEL + 1}")
        self.num_dims = router_dims + code_dims
        signs = np.random.default_rng([seed, 3]).integers(0, 2, (self.num_tokens, code_dims), dtype=np.int8)
        self._codes: Levels = _CODE_LEVEL * (2 * signs - 1)
        step = min(2, _TOP_LEVEL // max(1, self.active - 1))
        self._levels: Levels = (_TOP_LEVEL - step * np.arange(self.active)).astype(np.int8)

    def embedding(self, first: int, count: int) -> Levels:
        """[count, D], in ``UNIT``: rows of so many tokens."""
        chosen = self._chosen[first : first + count].astype(np.int64)
        tokens, layers, experts = np.ogrid[first : first + count, : self.layers, : self.experts]
        scores = (_REST_LEVEL - (7 * tokens + 3 * layers + 5 * experts) % 6).astype(np.int8)
        np.put_along_axis(scores, chosen, np.broadcast_to(self._levels, chosen.shape), axis=2)
        out = np.zeros((count, self.num_dims), dtype=np.int8)
        out[:, : self.layers * self.experts] = scores.reshape(count, -1)
        out[:, self._first_code :] = self._codes[first : first + count]
        return out

    def head(self, first: int, count: int) -> Levels:
        """[count, D], in ``HEAD_UNIT``: the row of a token is the code of the one before it."""
        out = np.zeros((count, self.num_dims), dtype=np.int8)
        out[:, self._first_code :] = self._codes[np.arange(first - 1, first + count - 1)]
        return out

    def router(self, layer: int) -> npt.NDArray[np.float32]:
        """[E, hidden]."""
        out = np.zeros((self.experts, self.hidden), dtype=np.float32)
        at = np.arange(self.experts)
        out[at, layer * self.experts + at] = 1
        return out

    def check(self, num_samples: int = 256) -> None:
        """Compute what every token chooses, and for some of them which token follows, as exact numbers."""
        for first in range(0, self.num_tokens, 1024):
            rows = self.embedding(first, min(1024, self.num_tokens - first))
            scores = rows[:, : self.layers * self.experts].reshape(len(rows), self.layers, self.experts)
            best = np.argsort(-scores, axis=2, kind="stable")[:, :, : self.active]
            assert np.array_equal(best, self._chosen[first : first + len(rows)])
        codes = self._codes.astype(np.float32) / _CODE_LEVEL
        for token in np.linspace(0, self.num_tokens - 1, num_samples, dtype=np.int64):
            likeness = codes @ codes[token] / codes.shape[1]
            likeness[token] = 0
            assert likeness.max() < _MAX_LIKENESS, f"token {token}'s code is too like another one's"


def _round_up(dims: int) -> int:
    return -(-dims // _ALIGNMENT) * _ALIGNMENT


def role_of(name: str) -> tuple[Role, int]:
    """What is planted in a tensor, and its layer if it is a router."""
    for pattern, role in _ROLES:
        if match := re.fullmatch(pattern, name):
            return role, int(next((group for group in match.groups() if group), 0))
    return "other", 0

"""Routing in one call: the router's product, softmax and the k best experts of each token.

Shapes: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from moray.runtime.kernels.programs import linear
from moray.runtime.kernels.setup import entry

# What the weights are: the K best probabilities, or the softmax of the K best logits.
PROBABILITIES, NORMALIZED, OF_BEST = range(3)


@intrinsic
def pointer(typingctx, address, like):
    """The address as a pointer to values of the type of ``like``."""
    kind = types.CPointer(like)

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64, like), codegen


@njit(nogil=True, cache=True)
def _softmax(values, out):
    largest = values[0]
    for value in values:
        largest = max(largest, value)
    total = 0.0
    for i in range(values.shape[0]):
        out[i] = np.float32(math.exp(np.float64(values[i]) - np.float64(largest)))
        total += out[i]
    for i in range(values.shape[0]):
        out[i] = np.float32(out[i] / total)


@njit(nogil=True, cache=True)
def _choose(logits, kind, ids, weights):
    """The K largest logits of one token, best first, the lowest id among equals, and their weights."""
    probabilities = np.empty(logits.shape[0], np.float32)
    if kind != OF_BEST:
        _softmax(logits, probabilities)
    left = np.empty(logits.shape[0], np.float32)
    for e in range(logits.shape[0]):
        left[e] = logits[e]
    for k in range(ids.shape[0]):
        best = 0
        for e in range(1, left.shape[0]):
            if left[e] > left[best] or (math.isnan(left[best]) and not math.isnan(left[e])):
                best = e
        ids[k], weights[k] = best, logits[best] if kind == OF_BEST else probabilities[best]
        left[best] = -np.inf
    if kind == OF_BEST:
        _softmax(weights, weights)
    elif kind == NORMALIZED:
        total = np.float32(0.0)
        for k in range(weights.shape[0]):
            total += weights[k]
        for k in range(weights.shape[0]):
            weights[k] /= total


@entry("functions kernel", shape=types.UniTuple(types.int64, 2))
def route(pool, functions, kernel, weight, bias, kind, x, num_tokens, shape, logits, ids, weights, scratch):
    """logits = x @ W^T + bias; ids and weights of the K best experts of each token.

    By address: the packed W [E, C], bias float32 [E] or 0, x float32 [T, C], and, written, logits float32 [T, E], ids
    int64 [T, K] and weights float32 [T, K]. shape: (E, K).
    """
    num_experts, top_k = shape
    linear(pool, functions, kernel, weight, x, num_tokens, logits, scratch)
    logits_TE = carray(pointer(logits, np.float32(0)), (num_tokens, num_experts))
    ids_TK = carray(pointer(ids, np.int64(0)), (num_tokens, top_k))
    weights_TK = carray(pointer(weights, np.float32(0)), (num_tokens, top_k))
    if bias:
        biases = carray(pointer(bias, np.float32(0)), (num_experts,))
        for t in range(num_tokens):
            for e in range(num_experts):
                logits_TE[t, e] += biases[e]
    for t in range(num_tokens):
        _choose(logits_TE[t], kind, ids_TK[t], weights_TK[t])

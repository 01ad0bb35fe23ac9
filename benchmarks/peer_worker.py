"""llama.cpp behind a pipe, for peer_client.py: one JSON object a line on stdin, one answer a line on stdout.

Runs under an interpreter that has llama-cpp-python and NumPy, and needs nothing of moray. Requests, by "op":

- load: model, threads, context, batch, sequences (at a time), load_mode and repack (null: llama.cpp's default) -> what
  llama.cpp said while loading;
- generate: ids, count -> seconds of each forward pass and the greedy tokens: the first pass is the whole prompt's, then
  one for each token. A pass ends when its logits are read and the largest is found. Nothing is reused between requests;
- wave: prompts, count -> as if all were asked for at once: seconds until each one's first token, until the last of all,
  and everybody's greedy tokens. Prompts are computed in their order in batches of whole or cut prompts, then one token
  of each in every batch: llama.cpp's parallel decoding as its own server does it. Needs ``sequences`` of load;
- logits: ids, file -> float32 [T, V] in a .npy file, of one window on its own;
- quantize: source, target, ftype -> what the quantizer said.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from time import perf_counter
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

_log: list[str] = []


@llama_cpp.llama_log_callback
def _keep_log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    _log.append(text.decode("utf-8", "replace"))


class Model:
    """A loaded model and its one context."""

    def __init__(self, request: dict[str, Any]) -> None:
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        if request["load_mode"] is not None:
            options.load_mode = request["load_mode"]
        if request["repack"] is not None:
            options.use_extra_bufts = request["repack"]
        self._model = llama_cpp.llama_model_load_from_file(request["model"].encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {request['model']}: {''.join(_log[-20:])}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = request["context"]
        settings.n_batch = settings.n_ubatch = request["batch"]
        settings.n_threads = settings.n_threads_batch = request["threads"]
        settings.n_seq_max = request["sequences"]
        self._most = request["batch"]  # tokens in one forward pass
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context: {''.join(_log[-20:])}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def generate(self, ids: list[int], count: int) -> dict[str, Any]:
        self._forget()
        seconds, tokens = [], []
        pending = ids
        for _ in range(count):
            started = perf_counter()
            self._decode(pending)
            tokens.append(int(self._row(-1).argmax()))
            seconds.append(perf_counter() - started)
            pending = tokens[-1:]
        return {"seconds": seconds, "ids": tokens}

    def wave(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        self._forget()
        started = perf_counter()
        first_s, tokens = [0.0] * len(prompts), [[0]] * len(prompts)
        waiting = [
            (sequence, position, token, position == len(ids) - 1)
            for sequence, ids in enumerate(prompts)
            for position, token in enumerate(ids)
        ]
        for start in range(0, len(waiting), self._most):
            for sequence, token in self._decode_rows(waiting[start : start + self._most]):
                tokens[sequence], first_s[sequence] = [token], perf_counter() - started
        for step in range(count - 1):
            rows = [(index, len(ids) + step, tokens[index][-1], True) for index, ids in enumerate(prompts)]
            for sequence, token in self._decode_rows(rows):
                tokens[sequence].append(token)
        return {"first_s": first_s, "whole_s": perf_counter() - started, "ids": tokens}

    def _decode_rows(self, rows: list[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """(sequence, position, token, whether the next is wanted) -> (sequence, next token)."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (sequence, position, token, is_wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, is_wanted
        code = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        return [(row[0], int(self._row(i).argmax())) for i, row in enumerate(rows) if row[3]]

    def logits(self, ids: list[int], file: str) -> dict[str, Any]:
        self._forget()
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        code = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        np.save(file, np.stack([self._row(i) for i in range(len(ids))]))
        return {}

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _decode(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def _row(self, index: int) -> npt.NDArray[np.float32]:
        """[V]: a view, valid until the next forward pass."""
        row = llama_cpp.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(row, shape=(self._vocabulary,))


def quantize(request: dict[str, Any]) -> None:
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = request["ftype"]
    options.nthread = request["threads"]
    source, target = request["source"].encode(), request["target"].encode()
    if code := llama_cpp.llama_model_quantize(source, target, ctypes.byref(options)):
        raise RuntimeError(f"llama_model_quantize returned {code}: {''.join(_log[-20:])}")


class Worker:
    """Answers requests."""

    def __init__(self) -> None:
        self._model: Model | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        _log.clear()
        if request["op"] == "load":
            self._model = Model(request)
            return {"log": "".join(_log), "version": llama_cpp.__version__, "system": self._system()}
        if request["op"] == "quantize":
            quantize(request)
            return {"log": "".join(_log)}
        assert self._model is not None, "no model is loaded"
        if request["op"] == "generate":
            return self._model.generate(request["ids"], request["count"])
        if request["op"] == "wave":
            return self._model.wave(request["prompts"], request["count"])
        assert request["op"] == "logits", request["op"]
        return self._model.logits(request["ids"], request["file"])

    def _system(self) -> str:
        return llama_cpp.llama_print_system_info().decode().strip(" |")


def main() -> None:
    # Only answers may reach the pipe: whatever else is printed goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except (RuntimeError, AssertionError, KeyError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

"""Record the expert choices of a Mixtral on real text, as traces for tests and benchmarks.

    python benchmarks/record_traces.py --checkpoint /path/to/tiny-mixtral --into tests/data/traces
    python benchmarks/record_traces.py --checkpoint DIR --into DIR --text a.txt b.txt --tokens 2000

The checkpoint is converted with recipe *none* and run in this process, everything resident, in numerics class float:
the choices are transformers' own. Of each text the first ``--prompt`` tokens are one forward pass, the rest up to
``--tokens`` are decoded one at a time, each given the text's own next token. Every MoE layer's state is given to the
routers of the next three layers, after those layers' own norms: the predictions. Compute time is that of the experts,
the shortest of three times: other programs disturb.

Without --text: files of CPython's test suite, which tiny-mixtral was not trained on.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import in_process, print_table, working_directory

from moray.runtime.convert.converter import convert
from moray.runtime.generation.text import encode_prompt
from moray.runtime.store.store import Store
from moray.runtime.trace.format import TraceHeader, read_trace
from moray.runtime.trace.recorder import TraceRecorder

DISTANCES = (1, 2, 3)
REPEATS = 3
TEXTS = ("test_descr.py", "test_socket.py", "test_statistics.py")


class MixtralObserver:
    """Records the layer calls of a Mixtral of ``load_model``, its experts bound. Undone by nothing: use it once."""

    def __init__(self, model: Any) -> None:
        self.recorder: TraceRecorder | None = None
        self.step = 0
        self._layers = model.model.layers
        for index, layer in enumerate(self._layers):
            # The plain forwards: fused layers call neither the norm nor the experts.
            layer.__dict__.pop("forward", None)
            layer.mlp.__dict__.pop("forward", None)
            layer.post_attention_layernorm.register_forward_pre_hook(self._predict)
            self._observe(index, layer.mlp.experts)
        self._state = torch.empty(0)

    def _predict(self, norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self._state = inputs[0]

    def _observe(self, layer: int, experts: Any) -> None:
        compute = experts.moray.forward

        def forward(module: Any, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
            seconds = []
            for _ in range(REPEATS):
                started = perf_counter()
                out: torch.Tensor = compute(module, x_TH, ids_TK, weights_TK)
                seconds.append(perf_counter() - started)
            compute_us = round(1e6 * min(seconds))
            used, tokens = np.unique(ids_TK.numpy(), return_counts=True)
            if self.recorder is not None:
                guesses = dict(self._guesses(layer))
                at = (self.step, layer, len(x_TH))
                self.recorder.record(*at, used, tokens, predicted=guesses, compute_us=compute_us)
            return out

        experts.moray.forward = forward

    def _guesses(self, layer: int) -> Iterator[tuple[int, list[int]]]:
        for distance in DISTANCES:
            if layer + distance < len(self._layers):
                later = self._layers[layer + distance]
                state_TH = later.post_attention_layernorm.forward(self._state).flatten(0, -2)
                ids_TK = later.mlp.gate.forward(state_TH)[2]  # the most likely first
                yield distance, (ids_TK[0] if len(ids_TK) == 1 else torch.unique(ids_TK)).tolist()


@torch.inference_mode()
def record(observer: MixtralObserver, model: Any, ids: list[int], num_prompt: int, recorder: TraceRecorder) -> None:
    """One forward pass over the first tokens, then one for each of the others."""
    observer.recorder, observer.step, cache = recorder, 0, None
    starts = [0, *range(num_prompt, len(ids))]
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        cache = model(input_ids=torch.tensor([ids[start:end]]), past_key_values=cache, use_cache=True).past_key_values
        observer.step += 1
    observer.recorder = None
    recorder.close()
    if recorder.error:
        raise SystemExit(recorder.error)


@contextmanager
def _store(checkpoint: Path) -> Iterator[Path]:
    with working_directory(2 * sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))) as root:
        convert(checkpoint, root / "store", "none")
        yield root / "store"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a Mixtral with its tokenizer")
    parser.add_argument("--into", type=Path, required=True, help="a directory; files in it are replaced")
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files; without it, CPython's test suite")
    parser.add_argument("--tokens", type=int, default=1200, help="of each text (1200)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the first forward pass (64)")
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    folder = Path(sysconfig.get_paths()["stdlib"]) / "test"
    texts = arguments.text or [folder / name for name in TEXTS]
    rows = []
    with _store(arguments.checkpoint) as path, in_process(path, "float") as runner, Store.open(path) as store:
        observer = MixtralObserver(runner.model)
        for text in texts:
            ids = list(encode_prompt(runner.tokenizer, text.read_text(encoding="utf-8")))[: arguments.tokens]
            if len(ids) < arguments.tokens:
                raise SystemExit(f"{text} has {len(ids)} tokens, expected {arguments.tokens}")
            top_k, note = runner.model.config.num_experts_per_tok, f"{arguments.checkpoint.name} on {text.name}"
            header = TraceHeader.of(store.manifest, store.fingerprint, top_k=top_k, note=note)
            file = arguments.into / f"{arguments.checkpoint.name}-{text.stem.removeprefix('test_')}.msgpack"
            record(observer, runner.model, ids, arguments.prompt, TraceRecorder(file, header))
            trace = read_trace(file)
            num_bytes = file.stat().st_size
            rows.append([str(file), str(len(ids)), str(len(trace.layers_C)), str(len(trace.experts_U)), str(num_bytes)])
    print_table(["trace", "tokens", "layer calls", "uses", "bytes"], rows)


if __name__ == "__main__":
    main()

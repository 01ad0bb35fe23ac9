"""A decoded token in one launch for all layers, against a launch or two a layer, in the same process.

    python benchmarks/layer_run.py                      # the demonstration model
    python benchmarks/layer_run.py /tmp/qwen --tokens 300

Both sides use the same weights, kernels and pool, each with a KV cache of its own; the logits must be equal bit for bit
(checked at every token). *token*: seconds from the token's id to the next one, the largest logit's; after a prompt of
32, the first 5 are not counted.
- *one launch*: as the step loop does it: ``FusedStep`` (model_modules.py) over a ``LayerRun`` (layer_run.py);
- *by layers*: the model's own forward, which calls layer after layer: two launches each, attention and MoE block.
Sides take turns, and who is first alternates. *ratio*: by layers / one launch, the median over tokens.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import describe_machine, in_process, print_table

from moray.deploy.config import demo_store
from moray.runtime.model.kv_layer import new_cache
from moray.runtime.model.model_modules import FusedModel, fused_step

_PROMPT_TOKENS, _NOT_COUNTED = 32, 5


@torch.inference_mode()
def measure(model: Any, tokens: int) -> dict[str, list[float]]:
    """Seconds of each token, by side."""
    base, step = model.base_model.forward, fused_step(model)
    if not isinstance(base, FusedModel) or step is None:
        raise SystemExit(f"{type(model).__name__} has no short step, expected a usual MoE model; take another store")
    joined, layers = base._parts, list(model.base_model.layers)
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, _PROMPT_TOKENS + tokens).tolist()
    cache = new_cache(model.config)
    model(input_ids=torch.tensor([ids[:_PROMPT_TOKENS]]), past_key_values=cache)
    torch.set_num_threads(1)
    caches = {"one launch": cache, "by layers": copy.deepcopy(cache)}

    def by_layers(token: int, cache: Any) -> torch.Tensor:
        output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    steps: dict[str, tuple[list[Any], Callable[[int, Any], Any]]] = {
        "one launch": (joined, step),
        "by layers": (layers, by_layers),
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    for index, token in enumerate(ids[_PROMPT_TOKENS:]):
        logits = {}
        for name in list(steps)[:: 1 if index % 2 else -1]:
            base._parts, compute = steps[name]
            started = perf_counter()
            logits[name] = compute(token, caches[name])
            logits[name].numpy().argmax()
            found[name].append(perf_counter() - started)
        assert torch.equal(*logits.values()), f"other logits at token {index}"
    base._parts = joined
    return {name: times[_NOT_COUNTED:] for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", default=demo_store())
    parser.add_argument("--tokens", type=int, default=300)
    arguments = parser.parse_args()
    with in_process(arguments.store) as runner:
        found = measure(runner.model, arguments.tokens)
    print(f"{describe_machine()}\n{arguments.store}, {arguments.tokens} tokens\n")
    rows = [
        (name, *(f"{1e3 * value:.3f}" for value in (median(times), quantiles(times, n=10)[0], min(times))))
        for name, times in found.items()
    ]
    print_table(("a token, ms", "median", "lowest tenth", "lowest"), rows)
    pairs = zip(found["by layers"], found["one launch"], strict=True)
    print(f"\nratio {median(slow / fast for slow, fast in pairs):.3f}")


if __name__ == "__main__":
    main()

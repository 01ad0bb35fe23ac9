"""benchmarks/record_traces.py against transformers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.reference import runner, stock_model

from moray.runtime.trace.format import TraceHeader, read_trace
from moray.runtime.trace.recorder import TraceRecorder

IDS = [5, 9, 2, 7, 1, 8, 8, 3, 4, 6, 11, 10]
NUM_PROMPT = 5


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("record_traces")


@torch.inference_mode()
def test_the_choices_and_predictions_are_those_of_transformers(
    script: ModuleType, store: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with runner(store("mixtral", "none"), "float") as made:
        num_experts = made.model.config.num_local_experts
        num_layers = made.model.config.num_hidden_layers
        header = TraceHeader("f00d", "mixtral", (num_experts,) * num_layers, (4096,) * num_layers)
        recorder = TraceRecorder(tmp_path / "a.trace", header)
        script.record(script.MixtralObserver(made.model), made.model, IDS, NUM_PROMPT, recorder)
    trace = read_trace(tmp_path / "a.trace")
    steps = range(1 + len(IDS) - NUM_PROMPT)
    assert trace.steps_C.tolist() == [step for step in steps for _ in range(num_layers)]
    assert trace.layers_C.tolist() == list(range(num_layers)) * len(steps)

    model = stock_model(checkpoint("mixtral"))
    chosen: list[torch.Tensor] = []  # [T, K] of each layer
    states: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0]))
        layer.mlp.gate.register_forward_hook(lambda _, inputs, outputs: chosen.append(outputs[2]))
    model(input_ids=torch.tensor([IDS]), use_cache=False)
    for call, (step, layer) in enumerate(zip(trace.steps_C.tolist(), trace.layers_C.tolist(), strict=True)):
        tokens = slice(NUM_PROMPT) if step == 0 else slice(NUM_PROMPT + step - 1, NUM_PROMPT + step)
        uses = slice(trace.starts[call], trace.starts[call + 1])
        used, counts = chosen[layer][tokens].unique(return_counts=True)
        assert trace.experts_U[uses].tolist() == used.tolist() and trace.tokens_U[uses].tolist() == counts.tolist()
        for distance, (starts, values) in trace.predicted.items():
            if layer + distance < num_layers:
                later = model.model.layers[layer + distance]
                guess = later.mlp.gate.forward(later.post_attention_layernorm.forward(states[layer][tokens]))[2]
                assert set(values[starts[call] : starts[call + 1]].tolist()) == set(guess.flatten().tolist())
    assert set(trace.predicted) == set(range(1, min(4, num_layers)))

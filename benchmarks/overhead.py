"""What moray costs over its kernels, and against stock transformers: tokens/s, and the time of one layer by part.

    python benchmarks/overhead.py                       # (a) tiny and (b) one Mixtral-8x7B layer; about 5 minutes
    python benchmarks/overhead.py --quick               # few tokens, (b) at a quarter of the width: does it work?
    python benchmarks/overhead.py --only tiny --checkpoint /path/to/tiny-mixtral

Models: (a) the demonstration model's geometry (6 layers, hidden 256, 8 experts of 448) and (b) ``--layers`` layers of
Mixtral-8x7B's (hidden 4096, 8 experts of 14336, top-2) under a small vocabulary of 1024. Weights are random (speed does
not depend on them, as long as tokens route evenly) unless --checkpoint names a Mixtral checkpoint for (a). (b) has one
layer by default: stock, moray in this process and moray's arena each hold a 16-bit copy, 2.6 GiB a layer.

Subjects, all loaded at once, all on every core of this machine:
- *stock*: transformers' own model with its default experts implementation (printed), float32 for (a), bfloat16 for (b);
  greedy over ``forward`` with a DynamicCache, without ``generate``, whose own overhead is not counted against it;
- *moray in process*: ``Runner`` over ``InProcessSource``; *moray through Ray*: ``moray.launch`` with one host.
  Recipes none (16 bits) and hqq4 (experts and attention at 4 bits, group 64; for (b) random codes, see make_store.py),
  numerics class int8.

Tokens/s, from the caller's side, batch 1, greedy, a prompt of 64 random tokens, new in each round:
- *prefill*: 64 / seconds from the call to the first token in the caller's hands;
- *decode*: 64 / seconds from the first token to the 65th.
Medians over ``--rounds`` rounds after one that is not counted; in a round every subject runs once, in turns, and the
first to run changes from round to round. *x stock*: the ratio to stock in the same table, higher is faster.

Time of a layer: means over 64 decode steps that follow a prompt of 64 tokens, in microseconds per layer and token.
- *attention*, *router*: forward of these modules;
- *grouping*, *lease*, *kernel*: the experts function's own clocks (ExpertsStats). kernel has gate, up, SwiGLU, down and
  the weighted sum; for stock it is the whole experts module;
- *dispatch*: what is left of the experts module; *rest*: what is left of the decoder layer (norms, residuals). Where a
  layer's first half is one launch, attention is in it, and the router too where its MoE block is one call;
- *outside the layers*: what is left of a token (embedding, head, sampling, step loop, delivery).
Modules are timed with hooks, about 2 us each, in this process. Of an engine's other process only its own clocks are
visible.

Beside them: one *data-plane round trip*, an Ask for two experts answered by a host process over ipc, and one
*Ray actor call* of the engine's host, without arguments; medians of 1000 and 300.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Protocol

import numpy as np
import ray
import torch
from common import describe_machine, in_process, print_table, working_directory
from geometry import PRESETS, Geometry
from layer_clock import LayerClock, LayerTimes, meter_times
from make_checkpoint import write_checkpoint
from make_store import write_store
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import moray
from moray.cluster.client import HostAddress, HostClient
from moray.cluster.messages import Ask, Coming
from moray.cluster.server import DataPlaneServer
from moray.runtime.convert.converter import convert
from moray.runtime.convert.recipe import Recipe
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.generation.request import GenerationRequest
from moray.runtime.generation.runner import Runner
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.memory import available_memory, format_bytes
from moray.runtime.store.store import Store

HQQ4 = "experts=hqq4:64,attention=hqq4:64"
_PROMPT_TOKENS = 64
_FIRST_ID = 3  # below are special tokens, maybe
_VOCABULARY = 1024  # prompts use the first so many tokens of any model


@dataclass(frozen=True)
class Plan:
    """One table: a model, and how long to measure."""

    title: str
    checkpoint: Path
    stores: dict[str, Path]  # recipe -> store
    stock_dtype: torch.dtype
    rounds: int
    tokens: int


@dataclass(frozen=True)
class Sample:
    """Tokens/s of one round of one subject, and the tokens."""

    prefill: float
    decode: float
    ids: list[int]


class Subject(Protocol):
    """Something that generates."""

    name: str

    def stream(self, prompt: list[int], count: int) -> Iterator[int]: ...

    def layer_times(self, prompt: list[int], count: int) -> LayerTimes: ...


# ------------------------------------------------------------------------------------- subjects


class Stock:
    """Transformers' own model."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        kind = self._model.config._experts_implementation
        self.name = f"stock, {str(dtype).removeprefix('torch.')}, {kind}"

    def stream(self, prompt: list[int], count: int) -> Iterator[int]:
        cache, ids = DynamicCache(config=self._model.config), prompt
        for _ in range(count):
            ids = [self._step(ids, cache)]
            yield ids[0]

    def layer_times(self, prompt: list[int], count: int) -> LayerTimes:
        clock, cache = LayerClock(self._model), DynamicCache(config=self._model.config)
        token = self._step(prompt, cache)
        with clock.attached():
            started = perf_counter()
            for _ in range(count):
                token = self._step([token], cache)
            seconds = perf_counter() - started
        return clock.times(count, seconds, None, None)

    @torch.inference_mode()
    def _step(self, ids: list[int], cache: DynamicCache) -> int:
        output = self._model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())


class InProcess:
    """A Runner."""

    def __init__(self, recipe: str, runner: Runner) -> None:
        self.name, self._runner = f"moray {recipe}, in process", runner

    def stream(self, prompt: list[int], count: int) -> Iterator[int]:
        for event in self._runner.stream(GenerationRequest(secrets.token_hex(8), tuple(prompt), count)):
            yield from event.token_ids

    def layer_times(self, prompt: list[int], count: int) -> LayerTimes:
        list(self.stream(prompt, 1))  # its KV cache is kept: below, every step computes one token
        clock, before = LayerClock(self._runner.model), self._runner.stats()
        with clock.attached():
            seconds, made = _seconds(self, prompt, count)
        return clock.times(made, seconds, before, self._runner.stats())


class ThroughRay:
    """An engine."""

    def __init__(self, recipe: str, engine: moray.Engine, num_layers: int) -> None:
        self.name, self.engine, self._num_layers = f"moray {recipe}, through Ray", engine, num_layers

    def stream(self, prompt: list[int], count: int) -> Iterator[int]:
        for event in self.engine.stream(prompt, max_new_tokens=count):
            yield from event.token_ids

    def layer_times(self, prompt: list[int], count: int) -> LayerTimes:
        list(self.stream(prompt, 1))
        before = self.engine.stats().experts
        seconds, made = _seconds(self, prompt, count)
        return meter_times(made, self._num_layers, seconds, before, self.engine.stats().experts)


def _seconds(subject: Subject, prompt: list[int], count: int) -> tuple[float, int]:
    started = perf_counter()
    made = len(list(subject.stream(prompt, count)))
    return perf_counter() - started, made


@contextmanager
def open_subjects(plan: Plan) -> Iterator[list[Subject]]:
    """Stock first, then moray in process and through Ray with each recipe."""
    with ExitStack() as stack:
        subjects: list[Subject] = [Stock(plan.checkpoint, plan.stock_dtype)]
        for recipe, store in plan.stores.items():
            subjects.append(InProcess(recipe, stack.enter_context(in_process(store))))
            with Store.open(store) as opened:
                num_layers = len(opened.manifest.layers)
            engine = stack.enter_context(moray.launch(store, hosts=1, device="cpu"))
            subjects.append(ThroughRay(recipe, engine, num_layers))
        yield subjects


# ------------------------------------------------------------------------------------- measuring


def measure(subject: Subject, prompt: list[int], count: int) -> Sample:
    started = perf_counter()
    ids, times = [], []
    for token in subject.stream(prompt, count + 1):
        times.append(perf_counter())
        ids.append(token)
    assert len(times) > 1, "the model ended the text at once; give another --checkpoint"
    return Sample(len(prompt) / (times[0] - started), (len(times) - 1) / (times[-1] - times[0]), ids)


def measure_rounds(plan: Plan, subjects: Sequence[Subject]) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {subject.name: [] for subject in subjects}
    for index in range(-1, plan.rounds):
        prompt = make_prompt(index)
        turn = index % len(subjects)
        found = {s.name: measure(s, prompt, plan.tokens) for s in (*subjects[turn:], *subjects[:turn])}
        _require_same_tokens(plan, found)
        if index >= 0:
            for name, sample in found.items():
                samples[name].append(sample)
    return samples


def make_prompt(index: int) -> list[int]:
    """Random tokens; no two prompts begin alike, or the first one's KV cache would serve the second."""
    random = np.random.default_rng(index + 1000)
    first = _FIRST_ID + index + 1
    return [first, *random.integers(_FIRST_ID, _VOCABULARY, _PROMPT_TOKENS - 1).tolist()]


def _require_same_tokens(plan: Plan, found: dict[str, Sample]) -> None:
    for recipe in plan.stores:
        one, other = (found[f"moray {recipe}, {where}"].ids for where in ("in process", "through Ray"))
        assert one == other, f"recipe {recipe}: other tokens through Ray than in process"


def round_trip_s(store: Path, count: int) -> float:
    """Median seconds of an Ask for two experts, answered by another process over ipc."""
    context = multiprocessing.get_context("spawn")
    address = HostAddress("benchmark", f"ipc://@moray-benchmark-{secrets.token_hex(8)}", secrets.token_hex(32))
    ready, stop = context.Event(), context.Event()
    process = context.Process(target=_serve, args=(store, address, ready, stop), daemon=True)
    process.start()
    assert ready.wait(60), "the host process did not start"
    client = HostClient(address, "benchmark")
    try:
        client.greet()
        return median(_timed_ask(client) for _ in range(count))
    finally:
        client.close()
        stop.set()
        process.join()


def _timed_ask(client: HostClient) -> float:
    started = perf_counter()
    reply, _ = client.request(Ask(layer=0, experts=[0, 1]))
    seconds = perf_counter() - started
    assert reply == Coming()
    return seconds


def _serve(path: Path, address: HostAddress, ready: Event, stop: Event) -> None:
    with Store.open(path) as store:
        host = ShardHost(store, [ExpertKey(0, 0), ExpertKey(0, 1)], 1)
        host.wait_filled()
        server = DataPlaneServer(address.host_id, host, address.address, address.token)
        ready.set()
        stop.wait()
        server.close()
        host.close()


def actor_call_s(engine: moray.Engine, count: int) -> float:
    """Median seconds of a call of the engine's host without arguments."""
    actor, times = engine.actors.hosts[0], []
    for _ in range(count):
        started = perf_counter()
        ray.get(actor.report.remote())
        times.append(perf_counter() - started)
    return median(times)


# -------------------------------------------------------------------------------------- printing


def print_rates(samples: dict[str, list[Sample]]) -> None:
    rows: list[tuple[str, ...]] = []
    stock: tuple[float, float] | None = None
    for name, found in samples.items():
        prefill, decode = median(s.prefill for s in found), median(s.decode for s in found)
        stock = stock or (prefill, decode)
        spread = f"{min(s.decode for s in found):.2f}-{max(s.decode for s in found):.2f}"
        ratios = (f"{decode / stock[1]:.2f}", f"{prefill:.1f}", f"{prefill / stock[0]:.2f}")
        rows.append((name, f"{decode:.2f}", spread, *ratios))
    print_table(("tokens/s, medians", "decode", "lowest-highest", "x stock", "prefill", "x stock"), rows)


def print_layer_times(times: dict[str, LayerTimes]) -> None:
    rows = []
    for name in ("attention", "router", "grouping", "lease", "kernel", "dispatch", "rest", "layer", "outside", "token"):
        label = {"layer": "= one layer", "outside": "outside the layers", "token": "= one token"}.get(name, name)
        values = [getattr(found, name) for found in times.values()]
        rows.append((label, *("-" if value is None else f"{value:.1f}" for value in values)))
    print_table(("us a token, decode", *times), rows)


def run(plan: Plan) -> None:
    """Measure and print one model."""
    with Store.open(next(iter(plan.stores.values()))) as store:
        needed = 3 * store.manifest.expert_bytes + (4 << 30) if store.manifest.expert_bytes > 1 << 30 else 0
    if needed > available_memory():
        raise SystemExit(
            f"{plan.title} needs about {format_bytes(needed)} of memory, {format_bytes(available_memory())} are free; "
            "choose fewer --layers, or --only tiny"
        )
    with open_subjects(plan) as subjects:
        samples = measure_rounds(plan, subjects)
        prompt = make_prompt(plan.rounds)
        times = {subject.name: subject.layer_times(prompt, plan.tokens) for subject in subjects}
        engine = next(subject.engine for subject in subjects if isinstance(subject, ThroughRay))
        call_s = actor_call_s(engine, 300)
        ask_s = round_trip_s(next(iter(plan.stores.values())), 1000)
    print(f"\n## {plan.title}\n\n{plan.rounds} rounds, {_PROMPT_TOKENS} prompt tokens, {plan.tokens} decode steps\n")
    print_rates(samples)
    print()
    print_layer_times(times)
    print(f"\ndata-plane round trip (Ask over ipc): {1e6 * ask_s:.0f} us; Ray actor call: {1e6 * call_s:.0f} us")


# ------------------------------------------------------------------------------------------ main


def plan_tiny(root: Path, checkpoint: Path | None, rounds: int, tokens: int) -> Plan:
    title = "(a) tiny: 6 layers, hidden 256, 8 experts of 448"
    source = checkpoint or write_checkpoint(root / "tiny", PRESETS["tiny"])
    stores = {"none": root / "tiny-none", "hqq4": root / "tiny-hqq4"}
    for recipe, store in stores.items():
        convert(source, store, recipe)
    return Plan(title, source, stores, torch.float32, rounds, tokens)


def plan_mixtral(root: Path, geometry: Geometry, rounds: int, tokens: int) -> Plan:
    title = f"(b) {geometry.layers} layer(s), hidden {geometry.hidden}, 8 experts of {geometry.intermediate}"
    source = write_checkpoint(root / "mixtral", geometry)
    convert(source, root / "mixtral-none", "none")
    write_store(root / "mixtral-hqq4", geometry, Recipe.parse(HQQ4))
    stores = {"none": root / "mixtral-none", "hqq4": root / "mixtral-hqq4"}
    return Plan(title, source, stores, torch.bfloat16, rounds, tokens)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a small Mixtral checkpoint for (a), instead of a random one")
    parser.add_argument("--only", choices=("tiny", "mixtral"))
    parser.add_argument("--layers", type=int, default=1, help="of (b); 2.6 GiB each, three times (1)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="decode steps in a round (64)")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    rounds, tokens = (2, 16) if arguments.quick else (arguments.rounds, arguments.tokens)
    geometry = replace(PRESETS["mixtral-layer"], layers=arguments.layers)
    if arguments.quick:
        geometry = replace(geometry, hidden=1024, intermediate=3584)
    disable_progress_bar()
    print(describe_machine())
    if arguments.only != "mixtral":
        with working_directory(1 << 30) as root:
            run(plan_tiny(root, arguments.checkpoint, rounds, tokens))
    if arguments.only != "tiny":
        with working_directory(5 * geometry.num_parameters) as root:
            run(plan_mixtral(root, geometry, rounds, tokens))


if __name__ == "__main__":
    main()

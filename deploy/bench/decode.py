"""``moray bench decode``: an engine on a store, from its caller's side and by its own clocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console

from moray.deploy.bench.idle import IdleCpu, measure_idle_cpu
from moray.deploy.bench.machine import describe_machine
from moray.deploy.bench.pairs import Spread
from moray.deploy.bench.working_set import working_set
from moray.deploy.config import EngineConfig
from moray.deploy.engine import Engine
from moray.deploy.terminal import running_engine
from moray.runtime.errors import ConfigError, RequestError
from moray.runtime.experts.meter import ExpertsStats
from moray.runtime.generation.request import Usage
from moray.runtime.kernels.readers import read_bandwidth
from moray.runtime.layout.packed import PackedSpec
from moray.runtime.memory import available_memory
from moray.runtime.model.families import build_model, load_config
from moray.runtime.model.weights_read import trunk_bytes_read
from moray.runtime.store.store import Store

PREFILL_TOKENS = (64, 512)
READ_BYTES = 512 << 20
IDLE_S = 2.0
_FIRST_ID = 3  # below are special tokens, maybe


@dataclass(frozen=True, slots=True)
class Generated:
    """One request, seen by its caller. Seconds from the call: to the first token, and to the last."""

    num_tokens: int
    first_s: float
    last_s: float
    usage: Usage

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first."""
        return (self.num_tokens - 1) / (self.last_s - self.first_s)


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of the experts function by part, bytes of experts that it read, and in how many layer calls."""

    kernel_s: float
    grouping_s: float
    leases_s: float
    expert_bytes: int
    layer_calls: int

    @classmethod
    def between(cls, before: ExpertsStats, after: ExpertsStats) -> Spent:
        return cls(
            kernel_s=after.compute_s - before.compute_s,
            grouping_s=after.group_s - before.group_s,
            leases_s=after.lease_s - before.lease_s,
            expert_bytes=sum(after.bytes_by_source.values()) - sum(before.bytes_by_source.values()),
            layer_calls=after.layer_calls - before.layer_calls,
        )

    def without(self, other: Spent) -> Spent:
        return Spent(
            self.kernel_s - other.kernel_s,
            self.grouping_s - other.grouping_s,
            self.leases_s - other.leases_s,
            self.expert_bytes - other.expert_bytes,
            self.layer_calls - other.layer_calls,
        )


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Of one decoded token. Seconds by part, their sum, and bytes of weights."""

    kernel_s: float
    grouping_s: float
    leases_s: float
    rest_s: float  # trunk, sampling, step loop, delivery
    total_s: float
    expert_bytes: float
    trunk_bytes: int

    @classmethod
    def of(cls, spent: Spent, num_layers: int, decode_rate: float, trunk_bytes: int) -> TokenCost:
        """``spent``: in single-token steps only."""
        steps = spent.layer_calls / num_layers
        total = 1 / decode_rate
        return cls(
            kernel_s=spent.kernel_s / steps,
            grouping_s=spent.grouping_s / steps,
            leases_s=spent.leases_s / steps,
            rest_s=total - (spent.kernel_s + spent.grouping_s + spent.leases_s) / steps,
            total_s=total,
            expert_bytes=spent.expert_bytes / steps,
            trunk_bytes=trunk_bytes,
        )

    @property
    def bytes_per_s(self) -> float:
        return (self.expert_bytes + self.trunk_bytes) / self.total_s


@dataclass(frozen=True)
class Round:
    """What one repeat measured."""

    decode_rate: float
    cost: TokenCost
    prefill_rates: dict[int, float]  # prompt tokens -> tokens a second
    read_rate: float  # of this machine's memory, bytes a second, while the engine was idle


@dataclass(frozen=True)
class DecodeReport:
    """One run."""

    config: EngineConfig
    machine: dict[str, Any]
    recipe: dict[str, str]
    device: str
    numerics: str  # class
    weight_bytes: int  # of the whole store
    read_bytes: int  # that a pass of a reader reads
    prompt_tokens: int
    new_tokens: int
    start_s: float
    rounds: list[Round]
    idle: IdleCpu

    @property
    def cost(self) -> TokenCost:
        """Of the round with the median decode rate (the slower one of two)."""
        by_rate = sorted(self.rounds, key=lambda r: r.decode_rate)
        return by_rate[(len(by_rate) - 1) // 2].cost

    def decode_rate(self) -> Spread:
        return Spread.of([r.decode_rate for r in self.rounds])

    def prefill_rate(self, tokens: int) -> Spread:
        return Spread.of([r.prefill_rates[tokens] for r in self.rounds])

    def read_rate(self) -> Spread:
        return Spread.of([r.read_rate for r in self.rounds])

    def ratio(self) -> Spread | None:
        """Bytes a second of decoding to the reader's, round by round; None on a GPU, whose memory is another."""
        if self.device != "cpu":
            return None
        return Spread.of([r.cost.bytes_per_s / r.read_rate for r in self.rounds])


class Prompts:
    """Random token ids. No two prompts begin alike, or the first one's KV cache would serve the second."""

    def __init__(self, vocabulary: int) -> None:
        self._random = np.random.default_rng(7)
        self._vocabulary = vocabulary
        firsts = self._random.permutation(np.arange(min(_FIRST_ID, vocabulary - 1), vocabulary)).tolist()
        self._firsts: Iterator[int] = iter(firsts)

    def make(self, tokens: int) -> list[int]:
        first = next(self._firsts, None)
        if first is None:
            raise ConfigError(
                f"--repeat needs more prompts than a vocabulary of {self._vocabulary} can begin; lower it"
            )
        return [first, *self._random.integers(0, self._vocabulary, tokens - 1).tolist()]


def measure_decode(
    config: EngineConfig, prompt_tokens: int, new_tokens: int, repeat: int, console: Console
) -> DecodeReport:
    """Launch an engine and measure it, one token a step. Progress goes to ``console``. Raises MorayError."""
    for option, value, least in (
        ("--prompt-tokens", prompt_tokens, 2),
        ("--new-tokens", new_tokens, 2),
        ("--repeat", repeat, 1),
    ):
        if value < least:
            raise ConfigError(f"{option} is {value}, expected at least {least}")
    machine = describe_machine()
    with Store.open(config.store_path) as store:
        manifest = store.manifest
    model_config = load_config(config.store_path)
    memory_spec = PackedSpec(min(READ_BYTES, available_memory() // 4) // 4096, 1024, "f32")
    prompts = Prompts(model_config.get_text_config().vocab_size)
    plain = config.model_copy(update={"speculation": "off"})  # bytes and times are of single tokens
    with running_engine(plain, console) as (engine, start_s):
        report = engine.actors.compute_report
        dtype = torch.float32 if report.device == "cpu" else torch.bfloat16
        trunk_bytes = trunk_bytes_read(build_model(model_config, dtype, "meta"), manifest, report.device)
        lengths = [tokens for tokens in PREFILL_TOKENS if tokens < report.context_length]
        rounds: list[Round] = []
        with working_set([memory_spec], 1) as memory, console.status("measuring") as status:
            for index in range(repeat + 1):
                status.update(f"repeat {index} of {repeat}" if index else "warming up")
                decode_rate, spent = _decode(engine, prompts.make(prompt_tokens), new_tokens)
                cost = TokenCost.of(spent, len(manifest.layers), decode_rate, trunk_bytes)
                prefill = {tokens: _prefill(engine, prompts.make(tokens)) for tokens in lengths}
                rate = read_bandwidth(memory.buffer, config.num_threads, passes=3)
                rounds.append(Round(decode_rate, cost, prefill, rate))
        with console.status("idle"):
            idle = measure_idle_cpu(engine.actors, IDLE_S)
    return DecodeReport(
        config=config,
        machine=machine,
        recipe=manifest.recipe,
        device=report.device,
        numerics=report.numerics,
        weight_bytes=manifest.expert_bytes + manifest.trunk_bytes,
        read_bytes=memory_spec.num_bytes,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        start_s=start_s,
        rounds=rounds[1:],
        idle=idle,
    )


def _decode(engine: Engine, prompt: Sequence[int], new_tokens: int) -> tuple[float, Spent]:
    """Tokens a second after the first, and what single-token steps of the experts took.

    The prompt is computed before, in a request of its own whose KV cache is kept. What is computed of it again all the
    same is what a request for a single token takes; that is taken off.
    """
    _require_uncached(_generate(engine, prompt, 1))
    before = engine.stats().experts
    _generate(engine, prompt, 1)
    between = engine.stats().experts
    made = _generate(engine, prompt, new_tokens)
    after = engine.stats().experts
    if made.num_tokens < 2:
        raise RequestError("the model ended its text at the first token; try another --prompt-tokens")
    return made.decode_rate, Spent.between(between, after).without(Spent.between(before, between))


def _prefill(engine: Engine, prompt: Sequence[int]) -> float:
    """Prompt tokens a second, from the call to the first token."""
    made = _generate(engine, prompt, 1)
    _require_uncached(made)
    return len(prompt) / made.first_s


def _generate(engine: Engine, prompt: Sequence[int], count: int) -> Generated:
    started = perf_counter()
    times: list[float] = []
    usage = None
    for event in engine.stream(prompt, max_new_tokens=count):
        now = perf_counter() - started
        times += [now] * len(event.token_ids)
        if event.finished is not None:
            usage = event.finished.usage
    assert usage is not None and len(times) == usage.completion_tokens
    return Generated(len(times), times[0], times[-1], usage)


def _require_uncached(made: Generated) -> None:
    assert made.usage.cached_tokens == 0, f"{made.usage.cached_tokens} prompt tokens came from a kept KV cache"

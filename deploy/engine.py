"""The Python interface: ``moray.launch`` and ``Engine``."""

from __future__ import annotations

import copy
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moray.actors.calls import CONTROL, call
from moray.actors.compute import EVENT_INTERVAL_S
from moray.actors.guard import Owner
from moray.actors.messages import ComputeStats, EngineStats, EngineStatus, NodeOrders
from moray.actors.spawn import run_on
from moray.actors.streams import Replay, insist, stream
from moray.actors.wiring import Actors, finish_actors, host_stats, start_actors, stop_actors
from moray.cluster import ray_session
from moray.cluster.nodes import choose_compute_node
from moray.cluster.ray_session import RaySession
from moray.deploy.config import EngineConfig, make_config
from moray.deploy.preparation import Preparation, prepare
from moray.runtime.errors import ClusterError
from moray.runtime.evaluation import Ids, TokenScores
from moray.runtime.events import Event
from moray.runtime.generation.request import (
    FinishReason,
    Message,
    Prompt,
    SamplingParams,
    Timings,
    TokenEvent,
    TokenLogProbs,
    Usage,
)

__all__ = ["Completion", "Engine", "Message", "launch"]

if TYPE_CHECKING:  # a process that only talks to an engine does not load torch
    import torch


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished generation."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    log_probs: tuple[TokenLogProbs, ...] = ()  # one for each token, if asked for


def launch(
    store: str | Path | None = None,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    hosts: int | None = None,
    address: str | None = None,
    nodes: Mapping[str, Mapping[str, str]] | None = None,
    numerics: Literal["auto", "int8", "float"] = "auto",
    policy: Literal["auto", "lfu", "layer-lru", "lru", "whole-layers"] = "auto",
    prefetch: Literal["auto", "on", "off"] = "auto",
    lanes: Literal["auto", "device-copy", "host-cpu", "local", "remote"] = "auto",
    replication: float | None = None,
    trace: str | Path | None = None,
    threads: int | None = None,
    host_memory: str | None = None,
    device_memory: str | None = None,
    context: int | None = None,
    max_running: int | None = None,
    speculation: Literal["auto", "off"] = "auto",
) -> Engine:
    """Start an engine on a store; None is the embedded demonstration model. ``EngineConfig`` describes the options.

    Use it as a context manager, or call ``close``. Raises MorayError: see moray.runtime.errors.

        with moray.launch() as engine:
            print(engine.generate("def main(", max_new_tokens=40).text)
    """
    values = {"store": store, "device": device, "hosts": hosts, "numerics": numerics}
    cluster = {"address": address, "nodes": nodes}
    memory = {"host_memory": host_memory, "device_memory": device_memory, "context": context}
    batching = {"max_running": max_running, "speculation": speculation}
    caching = {"policy": policy, "prefetch": prefetch, "lanes": lanes, "trace": trace, "replication": replication}
    return Engine(make_config(values | cluster | memory | batching | caching | {"threads": threads}))


class Engine:
    """A running engine: actors that hold a model, ready to generate. Safe to use from several threads."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        prepared = None if config.address else prepare(config)
        self._session = ray_session.join(config.address) if config.address else _start_local(config)
        self._actors: Actors | None = None
        try:
            self._actors = self._start(prepared)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def actors(self) -> Actors:
        """Handles and reports of the engine's actors. Raises ClusterError after ``close``."""
        if self._actors is None:
            raise ClusterError("the engine is closed; launch another")
        return self._actors

    def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """Generate to the end. Takes the options of ``stream``."""
        events = list(self.stream(prompt, **options))
        finished = events[-1].finished
        assert finished is not None
        return Completion(
            text="".join(event.text for event in events),
            token_ids=tuple(i for event in events for i in event.token_ids),
            finish_reason=finished.reason,
            usage=finished.usage,
            timings=finished.timings,
            log_probs=tuple(found for event in events for found in event.log_probs),
        )

    def chat(self, messages: Sequence[Message], **options: Any) -> Completion:
        """Generate the next turn of a chat, through the checkpoint's chat template where it has one.

        The KV cache of earlier turns is used again: ``usage.cached_tokens`` says how much of it.
        """
        return self.generate(messages, **options)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        num_log_probs: int | None = None,
        timeout_s: float | None = None,
        interval_s: float = EVENT_INTERVAL_S,
    ) -> Iterator[TokenEvent]:
        """Yield tokens and text as they come, at least ``interval_s`` apart if fast; the last event has ``finished``.

        Leaving the iterator cancels.

        ``prompt`` is a text, token ids, or a list of ``Message``. Temperature 0 is greedy; ``top_k`` 0 is all.
        Penalties, ``logit_bias`` (token id -> what is added to its logit) and ``num_log_probs`` are those of
        ``SamplingParams``. After ``timeout_s`` seconds the request is ended, with reason "deadline".
        If the compute actor dies, the stream pauses and goes on with the token that comes next.
        Raises RequestError, or ClusterError if the actor cannot be brought back.
        """
        penalties = presence_penalty, frequency_penalty
        biases = tuple((logit_bias or {}).items())
        sampling = SamplingParams(temperature, top_p, top_k, seed, *penalties, biases, num_log_probs)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        plain: Any = prompt if isinstance(prompt, str) else list(prompt)
        replay = Replay(secrets.token_hex(8), plain, max_new_tokens, sampling, stops, timeout_s, interval_s)
        yield from stream(self.actors.compute, self.actors.ledger, replay)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """float32 [T, V]: the model's logits after each of the T tokens."""
        import torch

        compute = self.actors.compute
        return torch.from_numpy(insist(compute, lambda: call(compute.logits, list(token_ids))).copy())

    def score(self, token_ids: Sequence[int], candidates: Ids | None = None) -> TokenScores:
        """How well the model predicts T tokens: log-probabilities of each next token and of the 64 most likely ones.

        ``candidates`` [T-1, K]: token ids whose log-probabilities are wanted as well. Raises RequestError.
        """
        compute = self.actors.compute
        scores: TokenScores = insist(compute, lambda: call(compute.score, list(token_ids), candidates))
        # A copy: what Ray gives are views of its object store, which would fill up and does not outlive the engine.
        return copy.deepcopy(scores)

    def stats(self) -> EngineStats:
        """What the experts did so far: tokens per expert, bytes by source, hits and misses, loads, prefetch, times.

        An actor that was restarted counts from then on; ``compute_restarts`` and ``events`` say if one was.
        """
        compute = self.actors.compute
        stats: ComputeStats = insist(compute, lambda: call(compute.stats.options(concurrency_group=CONTROL)))
        hosts = host_stats(self.actors)
        return EngineStats(
            *(stats.experts, stats.sources, stats.fetches, hosts, self._policy),
            stats.device,
            stats.prefetch,
            stats.generation,
            stats.num_restarts,
            stats.remote,
        )

    def events(self) -> tuple[Event, ...]:
        """What went wrong and what was done about it, oldest first: the last 1000 events, each with its cause's id."""
        events: tuple[Event, ...] = call(self.actors.orchestrator.events)
        return events

    def status(self) -> EngineStatus:
        """Which node holds what, and how it is."""
        status: EngineStatus = call(self.actors.orchestrator.status)
        return status

    def wait_filled(self) -> None:
        """Wait until the hosts' memory is full, or holds all experts; generating need not wait.

        Raises CorruptShardError or StoreError if a shard could not be loaded.
        """
        for host in (*self.actors.hosts, *self.actors.remote_hosts()):
            call(host.wait_filled)

    def close(self) -> None:
        """Stop the actors, and Ray if this engine started it. May be called twice."""
        actors, self._actors = self._actors, None
        if actors is not None:
            finish_actors(actors)
            stop_actors(actors)
        ray_session.leave(self._session)

    def _start(self, prepared: Preparation | None) -> Actors:
        config = self.config
        nodes, here = ray_session.living_nodes(), ray_session.this_node()
        node = choose_compute_node(nodes, here, needs_gpu=config.device == "cuda")
        path = config.store_path.absolute()
        orders = {name: NodeOrders(name, str(of.store or path), of.host_memory) for name, of in config.nodes.items()}
        if prepared is None:
            particular = orders.get(node.name) or orders.get(node.address)
            settings: dict[str, Any] = {"store": path}
            if particular is not None:
                settings = {"store": Path(particular.store_path)}
                settings |= {"host_memory": particular.host_memory} if particular.host_memory else {}
            config = config.model_copy(update=settings)
            prepared = prepare(config) if node.node_id == here else run_on(node, prepare, config)
        self._policy, self.fingerprint = prepared.policy, prepared.manifest.fingerprint
        return start_actors(
            str(config.store_path.absolute()),
            prepared.manifest,
            plan=prepared.plan,
            caching=prepared.caching,
            lanes=config.lanes,
            node=node,
            nodes=orders,
            is_joined=config.address is not None,
            num_hosts=prepared.num_hosts,
            numerics="float" if config.numerics == "float" else "int8",
            device=config.device,
            num_gpus=1 if node.num_gpus and config.device != "cpu" else 0,
            num_threads=prepared.num_threads,
            owner=Owner(os.getpid(), self._session.processes) if self._session.started_here else None,
        )


def _start_local(config: EngineConfig) -> RaySession:
    return ray_session.start_local(config.num_threads, num_actors=2 + config.num_hosts)

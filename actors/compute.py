"""The compute actor: a shell around ``Runner`` whose experts lie in the hosts' arenas."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from time import perf_counter, time
from typing import TYPE_CHECKING

from moray.actors.guard import exit_with
from moray.actors.home import Home
from moray.actors.ledger import COMPUTE
from moray.actors.messages import ComputeConfig, ComputeReport, ComputeStats, EngineView, StartTimes
from moray.cluster.client import HostAddress
from moray.cluster.health import HostState
from moray.cluster.keys import KeyPair
from moray.cluster.remote_host import RemoteStats
from moray.cluster.replicas import ExpertUse
from moray.cluster.residency import Place
from moray.runtime.arrays import Floats
from moray.runtime.errors import ClusterError, MorayError
from moray.runtime.events import ComputeFailed, ComputeRestarted, RemoteHostChanged
from moray.runtime.generation.request import GenerationRequest, Prompt, SamplingParams, TokenEvent
from moray.runtime.memory import reuse_freed_memory
from moray.runtime.store.store import Store
from moray.runtime.topology import CoreClaim, on_cores, read_cores

if TYPE_CHECKING:
    from moray.runtime.device.stats import DeviceStats
    from moray.runtime.device.tier import DeviceTier
    from moray.runtime.evaluation import Ids, TokenScores
    from moray.runtime.experts.meter import ExpertsStats
    from moray.runtime.experts.source import SourceStats
    from moray.runtime.generation.vocabulary import Vocabulary

_JOIN_S, _REJOIN_S = 30.0, 300.0  # for hosts to answer: at first they are there, later they may be restarting too
EVENT_INTERVAL_S = 0.04  # an event costs both processes half a millisecond; nobody reads more than 25 a second


class ComputeActor:
    """Loads the trunk when it is made, while the hosts load their experts; generates after ``attach``.

    When it was restarted it attaches by itself, to where the ledger says that the hosts are.

    torch, transformers and Numba are imported in methods, so that the driver, which only needs this class to
    start an actor of it, does not load them.
    """

    def __init__(self, config: ComputeConfig, home: Home) -> None:
        started = perf_counter()
        exit_with(config.owner)
        # It takes longer than anything else here: it begins before the orchestrator is there to be asked.
        threading.Thread(target=_import_libraries, name="moray-imports", daemon=True).start()
        self._config, self._home = config, home
        self._times = [time()]
        self._keys = KeyPair.make()
        self._report: ComputeReport | None = None
        self._failure: MorayError | None = None
        self._num_restarts, self._cause = 0, ""
        try:
            orders = home.starting(COMPUTE, os.getpid())
            self._num_restarts, self._cause = orders.num_restarts, orders.cause
        except MorayError as error:
            self._failure = error  # Ray would turn an error of the constructor into text
            return
        self._cores = CoreClaim(read_cores(), config.num_threads)
        try:
            with on_cores(self._cores.cpus):  # the threads of the kernels are made here
                self._load()
            if orders.hosts:
                self.attach(orders.hosts, home.admit(self._keys.public))
                home.note([ComputeRestarted(self._cause, os.getpid(), self._num_restarts, perf_counter() - started)])
        except MorayError as error:
            self._failure = error
            if orders.hosts:
                home.note([ComputeFailed(self._cause, str(error))], wait=True)
                os._exit(1)  # Ray tries again after that, but not after an error

    def public_key(self) -> str:
        """What remote hosts must admit before ``attach``: made anew with every process."""
        return self._keys.public

    def attach(self, local: Sequence[HostAddress], remote: Sequence[HostAddress]) -> ComputeReport:
        """Connect to the hosts, once they are ready. Raises ClusterError, or what kept the trunk from loading.

        ``local``: on this node, which hold every expert between them or load it from its disk.
        """
        if self._report is None:
            self._report = self._attach(local, remote)
            self._home.compute_ready(self._report.arenas)
        return self._report

    def report(self) -> ComputeReport:
        """Answers once the actor serves. Raises ClusterError if it cannot be brought back."""
        if self._report is None:
            raise self._failure or ClusterError("the compute actor knows no hosts; start the engine again")
        return self._report

    def _attach(self, local: Sequence[HostAddress], remote: Sequence[HostAddress]) -> ComputeReport:
        from moray.cluster.cluster_source import FORCED, ClusterSource
        from moray.runtime.experts.watch import WatchOptions
        from moray.runtime.generation.runner import Runner

        if self._failure is not None:
            raise self._failure
        config = self._config
        self._source = ClusterSource(
            self._store,
            local,
            remote,
            self._keys,
            numerics=config.numerics,
            lanes=config.lanes if config.lanes in FORCED else "auto",
            whole_layers=config.caching.whole_layers,
            join_s=_REJOIN_S if self._num_restarts else _JOIN_S,
            on_change=self._note_change,
            report=lambda event: self._home.note([event]),
        )
        prefetch = config.caching.prefetch
        watch = WatchOptions(
            prefetch != "off", prefetch == "auto", self._trace(), config.num_slots, config.caching.policy
        )
        with on_cores(self._cores.cpus):  # and the step loop's, which torch's come from
            tier = self._device_tier()
            self._runner = Runner(self._store, self._source, self._model, config.numerics, config.limits, watch, tier)
        began, imported, loaded = self._times
        return ComputeReport(
            node_id=self._home.node_id(),
            pid=os.getpid(),
            device=str(self._model.device),
            numerics=self._numerics_class(),
            context_length=self._runner.context_length,
            has_tokenizer=self._runner.tokenizer is not None,
            arenas=self._source.arena_refs(),
            times=StartTimes(began, imported, loaded, ready=time()),
            num_restarts=self._num_restarts,
            cause=self._cause,
        )

    def _note_change(self, host_id: str, old: HostState, new: HostState, why: str) -> None:
        self._home.note([RemoteHostChanged(host_id, host_id, old.value, new.value, why)])

    def _trace(self) -> str | None:
        """File to record into: another one after a restart, for a recorder replaces its file."""
        trace = self._config.caching.trace
        return trace if trace is None or not self._num_restarts else f"{trace}.{self._num_restarts}"

    def meet(self, host: HostAddress) -> None:
        """A remote host serves here now: a new one, or one that was restarted and has another key."""
        self._source.join(host)

    def part(self, host_id: str) -> None:
        """A remote host's node is gone."""
        self._source.leave(host_id)

    def _device_tier(self) -> DeviceTier | None:
        """The experts on the GPU, if there is one, which may read the arenas by itself."""
        from moray.cluster.cluster_source import FORCED
        from moray.runtime.device.tier import DeviceTier, default_budget

        manifest, device, num_bytes = self._store.manifest, self._model.device, self._config.device_bytes
        if device.type == "cpu":
            return None
        budget = default_budget(manifest, device) if num_bytes is None else num_bytes
        lanes = "auto" if self._config.lanes in FORCED else self._config.lanes
        tier = DeviceTier.of(manifest, device, budget, lanes)
        if tier.cache is not None:
            for arena in self._source.arenas:
                tier.cache.register(arena.base_address, arena.num_bytes)
        return tier

    def _load(self) -> None:
        reuse_freed_memory()
        self._store = Store.open(self._config.store_path)
        self._store.verify_trunk()  # while libraries are imported; it stays in the page cache
        _import_libraries()
        self._times.append(time())
        import torch

        from moray.runtime.kernels.pool import set_num_threads
        from moray.runtime.model.loader import load_model

        set_num_threads(self._config.num_threads)
        self._model = load_model(self._store, self._config.numerics, torch.device(_resolve(self._config.device)))
        self._times.append(time())

    def _numerics_class(self) -> str:
        if self._model.device.type == "cpu":
            return self._config.numerics
        return f"gpu-{str(self._model.dtype).removeprefix('torch.')}"

    def prepare(
        self, prompt: Prompt, max_new_tokens: int, sampling: SamplingParams, stop: tuple[str, ...]
    ) -> tuple[int, ...]:
        """Token ids of a prompt, for ``generate``. Raises RequestError if such a request can never be served."""
        ids = self._runner.encode(prompt)
        self._runner.check(GenerationRequest("prepared", ids, max_new_tokens, sampling, stop))
        return ids

    def generate(
        self,
        request_id: str,
        prompt: Prompt,
        max_new_tokens: int,
        sampling: SamplingParams,
        stop: tuple[str, ...],
        generated: tuple[int, ...] = (),
        timeout_s: float | None = None,
        interval_s: float = EVENT_INTERVAL_S,
    ) -> Iterator[TokenEvent]:
        """Stream a request's events, those after ``generated``, as ``Runner.stream`` does. Raises RequestError."""
        self.report()
        ids = self._runner.encode(prompt)
        request = GenerationRequest(request_id, ids, max_new_tokens, sampling, stop, generated, timeout_s)
        yield from self._runner.stream(request, interval_s)

    def vocabulary(self) -> Vocabulary:
        """What each token writes, and which ones end a text. Raises RequestError if the store has no tokenizer."""
        return self._runner.vocabulary()

    def ping(self) -> None:
        """Answers if the process lives."""

    def cancel(self, request_id: str) -> None:
        self._runner.cancel(request_id)

    def logits(self, token_ids: list[int]) -> Floats:
        """float32 [T, V]."""
        logits: Floats = self._runner.logits(token_ids).numpy()
        return logits

    def score(self, token_ids: list[int], candidates: Ids | None) -> TokenScores:
        return self._runner.score(token_ids, candidates)

    def finish(self) -> None:
        """End generation and write what was recorded of it."""
        self._runner.close()

    def stats(self) -> ComputeStats:
        return ComputeStats(
            experts=self._runner.stats(),
            sources=tuple(self._source.describe()),
            fetches=self._source.stats(),
            device=self._runner.device_stats(),
            generation=self._runner.generation_stats(),
            prefetch=self._runner.prefetch(),
            num_restarts=self._num_restarts,
            remote=self.remote_stats(),
        )

    def view(self) -> EngineView:
        """What there is to see. Raises ClusterError if the actor cannot be brought back."""
        import numpy as np

        self.report()
        experts, fetches = self._runner.stats(), self._source.stats()
        residency, on_device = self._source.residency(), self._runner.on_device()
        places, tiers = list(residency.places), list(residency.layers)
        if on_device is not None:
            tiers = [np.where(is_there, len(places), held) for is_there, held in zip(on_device, tiers, strict=True)]
            places.append(Place("device", str(self._model.device), self._home.node_id()))
        return EngineView(
            time_s=perf_counter(),
            num_restarts=self._num_restarts,
            has_chat_template=bool(getattr(self._runner.tokenizer, "chat_template", None)),
            places=tuple(places),
            tiers=tuple(np.minimum(held, 255).astype(np.uint8).tobytes() for held in tiers),
            recent=tuple(levels.tobytes() for levels in self._runner.recent_use()),
            uses=experts.uses,
            misses=fetches.misses,
            lanes=tuple(_bytes_by_lane(experts, fetches, self._runner.device_stats()).items()),
            generation=self._runner.generation_stats(),
        )

    def expert_use(self) -> ExpertUse:
        """How often experts were used, and where they are in memory. Raises ClusterError before ``attach``."""
        import numpy as np

        self.report()
        uses = tuple(np.array(counts, dtype=np.int64) for counts in self._runner.stats().tokens_per_expert)
        return ExpertUse(uses, *self._source.held())

    def remote_stats(self) -> tuple[RemoteStats, ...]:
        """Of every remote host."""
        return tuple(self._source.remote_stats())


_importing = threading.Lock()


def _import_libraries() -> None:
    """Import what takes seconds. A second call waits for the first."""
    with _importing:
        # Read when transformers is imported: a store is local, no hub is ever asked.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from moray.runtime.model.lean_imports import import_lean

        import_lean()
        import moray.cluster.cluster_source
        import moray.runtime.generation.runner  # noqa: F401


def _bytes_by_lane(experts: ExpertsStats, fetches: SourceStats, device: DeviceStats | None) -> dict[str, int]:
    """Names are those of runtime/lanes/lane.py."""
    if device is not None:
        return device.bytes_by_lane
    remote = experts.bytes_by_source.get("remote", 0)
    here = sum(experts.bytes_by_source.values()) - remote
    return {"host-cpu": here - fetches.missed_bytes, "disk-load": fetches.missed_bytes, "remote-compute": remote}


def _resolve(device: str) -> str:
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"

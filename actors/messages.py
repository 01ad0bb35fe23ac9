"""What crosses actor boundaries: frozen values, no dicts."""

from __future__ import annotations

from dataclasses import dataclass

from moray.actors.guard import Owner
from moray.cluster.client import HostAddress
from moray.cluster.identity import NodeIdentity
from moray.cluster.membership import MemberState
from moray.cluster.nodes import NodeInfo
from moray.cluster.remote_host import RemoteStats
from moray.cluster.residency import Place
from moray.cluster.topology import NodeReport
from moray.runtime.arena import ArenaRef
from moray.runtime.device.stats import DeviceStats
from moray.runtime.experts.meter import ExpertsStats
from moray.runtime.experts.shard_host import HostStats
from moray.runtime.experts.source import SourceInfo, SourceStats
from moray.runtime.generation.stats import GenerationStats
from moray.runtime.layout.packed import Numerics
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.planning.profile import GenerationLimits
from moray.runtime.prefetch.host import PrefetchMode
from moray.runtime.prefetch.replication import DEFAULT_SHARE


@dataclass(frozen=True, slots=True)
class Caching:
    """What happens when not all experts fit in memory."""

    policy: str
    prefetch: PrefetchMode
    whole_layers: bool  # load whole layers only, to compare with
    trace: str | None  # file of the compute actor's node to record layer calls into
    replication: float = DEFAULT_SHARE  # of a bandwidth, for copying hot experts of other nodes; 0: none are copied


@dataclass(frozen=True, slots=True)
class NodeOrders:
    """What a node is asked to make of its disk and memory."""

    name: str  # for messages
    store_path: str
    host_memory: str | None


@dataclass(frozen=True, slots=True)
class NodeSurvey:
    """What a node could hold, and how fast it is."""

    identity: NodeIdentity
    num_slots: int
    report: NodeReport


@dataclass(frozen=True, slots=True)
class EngineOrders:
    """What the orchestrator of an engine needs to place experts on nodes, now and when nodes come later."""

    store_path: str  # of the compute node; the default elsewhere
    compute_node: NodeInfo
    local_slots: dict[str, int]  # host id -> slots of its arena
    nodes: dict[str, NodeOrders]  # node's name or address -> what is particular about it
    token: str
    caching: Caching
    owner: Owner | None


@dataclass(frozen=True, slots=True)
class RemoteHostStatus:
    """A node's part in an engine."""

    host_id: str
    node: str
    state: MemberState
    reason: str
    address: str  # of the data plane; empty: it does not listen yet
    num_experts: int  # assigned to it
    link: RemoteStats | None  # as the compute actor sees it; None: it was never connected


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """An engine's view of its cluster."""

    store_path: str
    compute_node: str
    local_hosts: dict[str, int]  # host id -> experts assigned to it
    remote_hosts: tuple[RemoteHostStatus, ...]


@dataclass(frozen=True, slots=True)
class HostConfig:
    """An expert host's orders. Complete: a restarted host needs nothing else but its old arena."""

    address: HostAddress  # tcp:// to port 0: any free one
    store_path: str
    keys: tuple[ExpertKey, ...]  # that it can be asked for
    assigned: tuple[ExpertKey, ...]  # of these: what it fills its arena with
    index: int
    num_hosts: int  # of its node
    num_threads: int
    num_slots: int  # of the arena: as planned, at most one for each expert
    caching: Caching
    owner: Owner | None  # end with this process of the same machine; None: live until told
    network: str | None = None  # beside an ipc:// address: tcp:// to port 0, where hosts of other nodes may read


@dataclass(frozen=True, slots=True)
class HostPart:
    """What changes for a host as nodes come and go."""

    assigned: tuple[ExpertKey, ...]  # in place of what its orders say
    peers: tuple[HostAddress, ...]  # the other hosts of the engine


@dataclass(frozen=True, slots=True)
class HostReport:
    """A host that is ready."""

    host_id: str
    node_id: str
    pid: int
    address: HostAddress  # where it listens now, and its public key
    num_experts: int
    num_assigned: int
    arena: ArenaRef
    start_s: float  # its arena fills in the background from then on


@dataclass(frozen=True, slots=True)
class ComputeConfig:
    """The compute actor's orders."""

    store_path: str
    numerics: Numerics
    device: str
    num_threads: int
    owner: Owner | None
    caching: Caching
    num_slots: int | None  # of all hosts; None: one for each expert
    lanes: str  # where experts are computed if there is a device: auto, device-copy, host-cpu
    device_bytes: int | None  # for experts on the device, as planned; None: half of what is free there
    limits: GenerationLimits | None  # None: the model's own context and no limit of memory


@dataclass(frozen=True, slots=True)
class StartTimes:
    """When a compute actor had got how far, in seconds since the epoch."""

    began: float  # its process took the actor
    imported: float
    loaded: float  # the trunk
    ready: float


@dataclass(frozen=True, slots=True)
class ComputeReport:
    """A compute actor that is ready."""

    node_id: str
    pid: int
    device: str
    numerics: str  # class: int8, float, or gpu- and the device's type
    context_length: int
    has_tokenizer: bool
    arenas: dict[str, ArenaRef]  # host id -> this process's descriptor of its arena
    times: StartTimes
    num_restarts: int
    cause: str  # of the last restart


@dataclass(frozen=True, slots=True)
class OrchestratorReport:
    """An orchestrator that is ready."""

    pid: int


@dataclass(frozen=True, slots=True)
class ComputeStats:
    """What the compute actor's process has done so far."""

    experts: ExpertsStats
    sources: tuple[SourceInfo, ...]
    fetches: SourceStats
    device: DeviceStats | None  # None: there is none
    prefetch: str  # on or off, and why
    generation: GenerationStats
    num_restarts: int  # of the compute actor: what it did before the last is not counted
    remote: tuple[RemoteStats, ...]  # of hosts on other nodes


@dataclass(frozen=True, slots=True)
class EngineView:
    """What there is to see of an engine now. Counts are since the compute actor's start, ``num_restarts`` tells which.

    ``tiers`` and ``recent``: of each layer one byte per expert, an index into ``places`` and how much it was used of
    late (0 to 255).
    """

    time_s: float  # of the compute actor's own clock: differences between views are what counts
    num_restarts: int
    has_chat_template: bool
    places: tuple[Place, ...]
    tiers: tuple[bytes, ...]
    recent: tuple[bytes, ...]
    uses: int  # of experts by layer calls
    misses: int  # uses that did not find their expert in memory
    lanes: tuple[tuple[str, int], ...]  # bytes of the shards that each lane computed with
    generation: GenerationStats


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine has done so far: its compute actor and its hosts each since their own last start."""

    experts: ExpertsStats
    sources: tuple[SourceInfo, ...]
    fetches: SourceStats
    hosts: tuple[HostStats, ...]
    policy: str  # of eviction, and why it was chosen
    device: DeviceStats | None
    prefetch: str  # on or off, and why
    generation: GenerationStats
    compute_restarts: int
    remote: tuple[RemoteStats, ...]

    @property
    def hits(self) -> int:
        """Uses of experts by layer calls that found them in memory."""
        return self.experts.uses - self.fetches.misses

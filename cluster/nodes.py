"""On which nodes an engine's actors run. Pure: Ray's view of the cluster goes in, node ids come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moray.runtime.errors import ClusterError

ROLE_LABEL = "role"  # nodes are labelled with `ray start --labels role=compute`


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A living node, as Ray last heard of it (some seconds old)."""

    node_id: str
    labels: Mapping[str, str]
    num_gpus: int
    name: str = ""  # `ray start --node-name`; Ray's default is the node's IP address
    address: str = ""  # its IP address
    started_ms: int = 0  # Unix time
    num_cpus: int = 0  # as Ray counts them
    memory_bytes: int = 0  # that Ray would give to tasks


def choose_compute_node(nodes: Sequence[NodeInfo], here: str, *, needs_gpu: bool) -> NodeInfo:
    """Where the compute actor runs: a node labelled role=compute, else this process's own, else any.

    ``needs_gpu`` keeps only nodes with a GPU. Ties go to the lowest node id, so that the answer is always the same.
    Expert hosts run beside it, their arenas used in place. Raises ClusterError if no node fits.
    """
    fitting = [node for node in nodes if node.num_gpus > 0 or not needs_gpu]
    if not fitting:
        raise ClusterError(
            f"none of the {len(nodes)} nodes has {'a GPU' if needs_gpu else 'joined the cluster'}; "
            + ("use device cpu" if needs_gpu else "start one with `ray start`")
        )

    def preference(node: NodeInfo) -> tuple[bool, bool, str]:
        return node.labels.get(ROLE_LABEL) != "compute", node.node_id != here, node.node_id

    return min(fitting, key=preference)


def choose_host_nodes(nodes: Sequence[NodeInfo], compute: NodeInfo) -> list[NodeInfo]:
    """The other nodes that hold experts: those labelled role=host, by name."""
    others = [node for node in nodes if node.labels.get(ROLE_LABEL) == "host" and node.node_id != compute.node_id]
    return sorted(others, key=lambda node: (node.name, node.node_id))

"""A running cluster, measured: every node by a probe on it, and the links between them."""

from __future__ import annotations

from typing import Any

import ray

from moray.actors.calls import call, fetch
from moray.actors.probe import NodeProbe
from moray.actors.spawn import kill_all, make_remote, on_node
from moray.cluster.topology import Topology


def measure_cluster(store_path: str, compute_node: str) -> Topology:
    """Measure every living node, all at once, and then the links from the compute node (a Ray node id), one by one.

    Raises StoreError for a node without the store, HostLostError for one that cannot be reached.
    """
    nodes = {str(node["NodeID"]): node for node in ray.nodes() if node["Alive"]}
    names = [str(node.get("NodeName") or node["NodeManagerAddress"]) for node in nodes.values()]
    unique = {
        node_id: name if names.count(name) == 1 else node_id[:12] for node_id, name in zip(nodes, names, strict=True)
    }
    probes: dict[str, Any] = {}
    try:
        for node_id, node in nodes.items():
            made = make_remote(NodeProbe, **on_node(node_id))
            probes[node_id] = made.remote(unique[node_id], str(node["NodeManagerAddress"]), store_path)
        found = fetch(lambda: ray.get([probe.measure.remote() for probe in probes.values()]))
        reports = {unique[node_id]: report for node_id, report in zip(probes, found, strict=True)}
        here = probes[compute_node]
        key, links = call(here.client_key), {}
        for node_id, probe in probes.items():
            if probe is not here:
                links[unique[node_id]] = call(here.link_to, call(probe.listen, key))
        return Topology(unique[compute_node], reports, links)
    finally:
        kill_all([*probes.values()])

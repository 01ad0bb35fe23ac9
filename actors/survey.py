"""What a node could hold and how fast it is, found out on the node itself."""

from __future__ import annotations

from moray.actors.messages import NodeOrders, NodeSurvey
from moray.cluster.identity import identity_of
from moray.cluster.topology import measure_node
from moray.runtime import memory
from moray.runtime.errors import StoreError
from moray.runtime.planning.host_plan import plan_host_slots
from moray.runtime.store.store import Store


def survey(orders: NodeOrders) -> NodeSurvey:
    """Takes about two seconds.

    Raises StoreError without a store at this path or an expert in it, ResourceError without memory for an expert.
    """
    try:
        store = Store.open(orders.store_path)
    except StoreError as error:
        raise StoreError(
            f"on node {orders.name}: {error}; copy the store there, or name its directory under `nodes` in the "
            "configuration"
        ) from error
    with store:
        manifest = store.manifest
        num_slots = plan_host_slots(
            manifest.slot_bytes, len(manifest.shards), memory.available_memory(), orders.host_memory, orders.name
        )
        return NodeSurvey(identity_of(store), num_slots, measure_node(orders.store_path))

"""What a node could hold, found out on the node itself."""

from __future__ import annotations

from moray.actors.messages import NodeOrders, NodeReport
from moray.cluster.identity import identity_of
from moray.runtime import memory
from moray.runtime.cpu import usable_cores
from moray.runtime.errors import StoreError
from moray.runtime.planning.host_plan import plan_host_slots
from moray.runtime.store.store import Store


def survey(orders: NodeOrders) -> NodeReport:
    """Raises StoreError without a store at this path, ResourceError without memory for an expert."""
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
        return NodeReport(identity_of(store), num_slots, usable_cores())

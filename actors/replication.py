"""Copying hot experts of other nodes to the compute node, in the background."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from time import monotonic, sleep
from typing import Any, Protocol

from moray.cluster.nodes import NodeInfo
from moray.cluster.replicas import ExpertUse, RemoteHeat
from moray.runtime.layout.shard import ExpertKey

_INTERVAL_S = 5.0  # between two looks at what is used
_log = logging.getLogger("moray.orchestrator")


class ReplicationHands(Protocol):
    """What is done through Ray."""

    def expert_use(self) -> ExpertUse | None:
        """The compute actor's; None if it does not answer soon."""

    def find_host(self, node: NodeInfo, host_id: str) -> Any:
        """The handle of a host that somebody else started."""

    def replicate(self, host: Any, keys: Sequence[ExpertKey]) -> None:
        """Have a host copy these in the background; returns at once."""


def replicate(
    hands: ReplicationHands, node: NodeInfo, owned: Mapping[str, Collection[ExpertKey]], slots: Mapping[str, int]
) -> None:
    """Tell the compute node's hosts what to copy, for ever. ``owned``, ``slots``: as in RemoteHeat."""
    heat, last = RemoteHeat(owned, slots), monotonic()
    while True:
        sleep(_INTERVAL_S)
        use = hands.expert_use()
        if use is None:
            continue
        now = monotonic()
        for host_id, keys in heat.step(use, now - last).items():
            hands.replicate(hands.find_host(node, host_id), keys)
            _log.info("host %s is to copy %d experts that other nodes have", host_id, len(keys))
        last = now

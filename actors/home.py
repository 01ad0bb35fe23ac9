"""What actors ask of Ray and of their engine's orchestrator, without knowing Ray."""

from __future__ import annotations

from typing import Protocol

from moray.cluster.client import HostAddress
from moray.runtime.arena import ArenaRef


class Home(Protocol):
    """The wiring's ``RayHome`` is it."""

    def node_id(self) -> str:
        """Ray's id of this process's node."""

    def survivor(self, host_id: str) -> ArenaRef | None:
        """Who still holds the arena of a host that was restarted."""

    def client_keys(self) -> list[str]:
        """Public keys of who may connect over the network."""

    def announce(self, address: HostAddress) -> None:
        """Tell where a host listens, which is new at every start; returns at once."""

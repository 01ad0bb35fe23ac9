"""What actors ask of Ray and of their engine's orchestrator, without knowing Ray."""

from __future__ import annotations

from typing import Protocol

from moray.actors.ledger import LedgerClient
from moray.actors.messages import HostPart
from moray.cluster.client import HostAddress


class Home(LedgerClient, Protocol):
    """``RayHome`` is it."""

    def node_id(self) -> str:
        """Ray's id of this process's node."""

    def client_keys(self) -> list[str]:
        """Public keys of who may connect over the network."""

    def admit(self, client_key: str) -> list[HostAddress]:
        """Let the holder of this key connect to the remote hosts. Returns where they are."""

    def announce(self, address: HostAddress) -> HostPart:
        """Tell where a host listens to the network, which is new at every start."""

"""What two nodes of one engine must have in common. Pure: both sides in, an error that names both out."""

from __future__ import annotations

from dataclasses import dataclass, fields

import moray
from moray.runtime.errors import ClusterError
from moray.runtime.layout.packed import LAYOUT_ID
from moray.runtime.store.manifest import NUMERICS_ID
from moray.runtime.store.store import Store

_REMEDIES = {
    "moray": "install the same version of moray on both",
    "layout": "install the same version of moray on both",
    "numerics": "install the same version of moray on both",
    "store": "give both the same store: copy its directory, or convert with the same recipe",
}


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """Outputs are equal bit for bit between nodes whose identities are equal."""

    moray: str  # version
    layout: str
    numerics: str  # rules of class int8
    store: str  # fingerprint


def identity_of(store: Store) -> NodeIdentity:
    """This process's, with this store (whose own numerics id is a part of its fingerprint)."""
    return NodeIdentity(moray.__version__, LAYOUT_ID, NUMERICS_ID, store.fingerprint)


def check_identity(ours: NodeIdentity, theirs: NodeIdentity, our_node: str, their_node: str) -> None:
    """Raises ClusterError for the first difference, naming both sides and the remedy."""
    for field in fields(NodeIdentity):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if mine != other:
            raise ClusterError(
                f"node {their_node} cannot join: its {field.name} is {other}, node {our_node} has {mine}; "
                f"{_REMEDIES[field.name]}"
            )

"""The memory of a node that only holds experts and computes them: how many slots its arena gets. Pure."""

from __future__ import annotations

from moray.runtime.errors import ResourceError
from moray.runtime.layout.shard import ALIGNMENT, round_up
from moray.runtime.memory import format_bytes
from moray.runtime.planning.plan import COMPUTE_BYTES, RAY_BYTES
from moray.runtime.planning.sizes import parse_bytes

_SPARE_SHARE = 32  # of the memory is left to others
_ENTRY_BYTES = 128  # of an arena's header, for a slot and an expert: rounded up


def plan_host_slots(
    slot_bytes: int, num_experts: int, available_bytes: int, host_memory: str | None, where: str
) -> int:
    """Slots of at most ``slot_bytes`` bytes beside Ray and a process that computes; at most one an expert.

    ``host_memory``: of the arena, as written; None: what is left. Raises ResourceError if not one slot fits.
    """
    slot_bytes = round_up(slot_bytes, ALIGNMENT)
    processes = RAY_BYTES + COMPUTE_BYTES
    room = available_bytes - processes - available_bytes // _SPARE_SHARE
    if host_memory is not None:
        given = parse_bytes(host_memory, available_bytes, "host_memory")
        if given > room:
            raise ResourceError(
                f"host_memory of {where} is {host_memory} ({format_bytes(given)}), and {format_bytes(max(0, room))} is "
                f"left there beside {format_bytes(processes)} of processes; give less, or close other programs"
            )
        room = given
    num_slots = min(num_experts, (room - ALIGNMENT) // (slot_bytes + _ENTRY_BYTES))
    if num_slots < 1:
        raise ResourceError(
            f"{where} has {format_bytes(max(0, room))} for experts, one takes {format_bytes(slot_bytes)}, and its "
            f"processes {format_bytes(processes)}; close other programs there, or take the node out of the cluster"
        )
    return num_slots

"""The plan of an engine's memory: every byte is given to something before anything is loaded. Pure.

On a CPU everything comes out of the machine's memory:

    processes + trunk + workspace + KV caches + arenas <= available

On a GPU the trunk, the workspace and the KV caches lie on the device, and are planned against its memory alone.

The rule. If all experts fit beside one sequence of ``LEAST_CONTEXT`` tokens (less if the model's limit is less, or what
``--context`` says), all become resident, and KV caches may take what is left, up to eight sequences of full length.
Otherwise KV caches and workspace together get an eighth of what processes and trunk leave, or what that one sequence
needs if it is more, a thirty-second of the memory is left to others, and the arenas get the rest. With
``--host-memory`` the arenas get exactly that, and KV caches may take the rest.

Prompts are computed in chunks of 512 tokens. With fewer slots than experts each chunk reads its experts again, so
chunks are as large as a sixteenth of that memory allows, up to 2048 tokens. They are smaller where the least
context would not fit otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moray.runtime.errors import ConfigError, ResourceError
from moray.runtime.layout.shard import ALIGNMENT, round_up
from moray.runtime.memory import format_bytes
from moray.runtime.planning.profile import CHUNK, CHUNKS, GenerationLimits, ModelProfile
from moray.runtime.planning.sizes import parse_bytes

LEAST_CONTEXT = 4096
NUM_SEQUENCES = 8  # as many as run at once
_LEAST_SLOTS = 2  # one is read while the next is loaded
_KV_SHARE, _CHUNK_SHARE, _SPARE_SHARE = 8, 16, 32

# Measured (PSS, with the demonstration model): Ray's processes 203 MiB, the orchestrator 60, the compute process 590
# besides what it loads (Python, torch, compiled kernels: benchmarks/memory.py allows 600), an expert host 66.
RAY_BYTES = 220 << 20
ORCHESTRATOR_BYTES = 64 << 20
COMPUTE_BYTES = 600 << 20
HOST_BYTES = 72 << 20


@dataclass(frozen=True, slots=True)
class Budgets:
    """What may be used. ``host_memory``: of all arenas of the node, ``device_memory``: of the device; as written."""

    available_bytes: int
    host_memory: str | None = None
    context: int | None = None
    device_bytes: int | None = None  # free on the GPU; None: everything is computed on the CPU
    device_memory: str | None = None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes in bytes. ``slots`` and ``experts`` are of each host, in their order."""

    profile: ModelProfile
    limits: GenerationLimits
    slot_bytes: int  # a slot as it lies in an arena
    slots: tuple[int, ...]
    experts: tuple[int, ...]
    processes_bytes: int
    workspace_bytes: int
    available_bytes: int
    device_bytes: int | None  # what may be used of the device

    @property
    def arena_bytes(self) -> int:
        return _arenas(self.slots, self.experts, self.slot_bytes)

    @property
    def num_slots(self) -> int:
        return sum(self.slots)

    @property
    def num_experts(self) -> int:
        return sum(self.experts)

    @property
    def all_resident(self) -> bool:
        return self.slots == self.experts

    @property
    def sequence_bytes(self) -> int:
        """Of one sequence of full length."""
        return self.limits.sequence_bytes(self.limits.context_length)

    @property
    def kv_bytes(self) -> int:
        """Most bytes of all KV caches."""
        assert self.limits.kv_bytes is not None
        return self.limits.kv_bytes

    @property
    def host_bytes(self) -> int:
        """Everything in the machine's memory."""
        return self.processes_bytes + self.arena_bytes + (0 if self.device_bytes is not None else self.model_bytes)

    @property
    def device_expert_bytes(self) -> int | None:
        """What the rest of the model leaves of the device to experts; None without a device."""
        return None if self.device_bytes is None else self.device_bytes - self.model_bytes

    @property
    def model_bytes(self) -> int:
        """Everything of the compute process: on the device if there is one."""
        return self.profile.trunk_bytes + self.workspace_bytes + self.kv_bytes

    def validate(self) -> None:
        assert self.host_bytes <= self.available_bytes
        assert self.device_bytes is None or self.model_bytes <= self.device_bytes
        assert self.sequence_bytes <= self.kv_bytes
        assert all(least_slots(e) <= s <= e for s, e in zip(self.slots, self.experts, strict=True))


def plan_memory(
    profile: ModelProfile, slot_bytes: int, experts: Sequence[int], budgets: Budgets, what: str
) -> MemoryPlan:
    """Plan an engine whose hosts hold ``experts`` experts each, of at most ``slot_bytes`` bytes.

    ``what`` names the store in errors. Raises ConfigError for a budget that makes no sense, ResourceError with every
    part's bytes if the smallest engine does not fit.
    """
    return _Planner(profile, round_up(slot_bytes, ALIGNMENT), tuple(experts), budgets, what).plan()


def least_slots(experts: int) -> int:
    """The fewest slots of a host with so many experts."""
    return min(_LEAST_SLOTS, experts)


def describe(plan: MemoryPlan) -> list[tuple[str, int, str]]:
    """What takes how many bytes, and why."""
    limits, profile = plan.limits, plan.profile
    resident = "all experts" if plan.all_resident else f"{plan.num_slots} of {plan.num_experts} experts at a time"
    sequences = plan.kv_bytes / plan.sequence_bytes if plan.sequence_bytes else NUM_SEQUENCES
    chunk = profile.chunk_of(limits.chunk, limits.context_length)
    return [
        ("processes", plan.processes_bytes, f"Ray, Python and torch in {2 + len(plan.slots)} actors"),
        ("trunk", profile.trunk_bytes, "everything but the routed experts"),
        ("workspace", plan.workspace_bytes, f"activations of {chunk} tokens of a prompt, at the planned context"),
        (
            "KV caches",
            plan.kv_bytes,
            f"at most: {sequences:.1f} sequences of {limits.context_length} tokens, "
            f"{format_bytes(plan.sequence_bytes)} each",
        ),
        ("arenas", plan.arena_bytes, f"{resident}, {format_bytes(plan.slot_bytes)} each"),
    ]


class _Planner:
    """One plan being made. ``room``: bytes of the machine's memory for arenas and, on a CPU, sequences."""

    def __init__(
        self, profile: ModelProfile, slot_bytes: int, experts: tuple[int, ...], budgets: Budgets, what: str
    ) -> None:
        self._profile, self._slot_bytes, self._experts = profile, slot_bytes, experts
        self._budgets, self._what = budgets, what
        self._on_device = budgets.device_bytes is not None
        if budgets.device_memory is not None and not self._on_device:
            raise ConfigError(f"device_memory is {budgets.device_memory!r}, and no GPU computes here; leave it out")
        if budgets.context is not None and not 2 <= budgets.context <= profile.context_length:
            raise ConfigError(
                f"context is {budgets.context}, expected 2 to {profile.context_length} tokens, the model's own limit"
            )
        self._device = 0
        if budgets.device_bytes is not None:
            self._device = min(
                budgets.device_bytes,
                parse_bytes(budgets.device_memory or "90%", budgets.device_bytes, "device_memory"),
            )
        self._wanted = budgets.context or profile.context_length
        self._least = budgets.context or min(profile.context_length, LEAST_CONTEXT)
        self._processes = RAY_BYTES + ORCHESTRATOR_BYTES + COMPUTE_BYTES + HOST_BYTES * len(experts)
        self._room = budgets.available_bytes - self._processes - (0 if self._on_device else profile.trunk_bytes)
        self._smallest = tuple(least_slots(count) for count in experts)

    def plan(self) -> MemoryPlan:
        given, full = self._given_arena(), self._arenas(self._experts)
        least = self._need(CHUNKS[0], self._least)
        beside = 0 if self._on_device else least  # what the arenas must leave in the machine's memory
        smallest = self._arenas(self._smallest) if given is None else given
        if smallest + beside > self._room or (self._on_device and least > self._rest):
            raise ResourceError(self._explain(given))
        if given is not None:
            slots = self._slots_in(given)
        elif full + beside <= self._room:
            slots = self._experts
        else:
            spare = self._budgets.available_bytes // _SPARE_SHARE
            room = max(self._room - spare, smallest + beside)
            share = 0 if self._on_device else max(least, room // _KV_SHARE)
            slots = self._slots_in(max(smallest, room - share))
            return self._finish(slots, self._rest if self._on_device else min(share, self._room - self._arenas(slots)))
        return self._finish(slots, self._rest if self._on_device else self._room - self._arenas(slots))

    def _finish(self, slots: tuple[int, ...], memory: int) -> MemoryPlan:
        """``memory``: bytes for sequences and their workspace."""
        limits, workspace = self._limits(memory, is_capped=slots != self._experts)
        plan = MemoryPlan(
            profile=self._profile,
            limits=limits,
            slot_bytes=self._slot_bytes,
            slots=slots,
            experts=self._experts,
            processes_bytes=self._processes,
            workspace_bytes=workspace,
            available_bytes=self._budgets.available_bytes,
            device_bytes=self._device if self._on_device else None,
        )
        plan.validate()
        return plan

    @property
    def _rest(self) -> int:
        """Bytes of the device for sequences."""
        return self._device - self._profile.trunk_bytes

    def _given_arena(self) -> int | None:
        """Bytes of all arenas, if the user says so. Raises ConfigError, ResourceError."""
        text = self._budgets.host_memory
        if text is None:
            return None
        available = self._budgets.available_bytes
        given = parse_bytes(text, available, "host_memory")
        if given > available:
            raise ResourceError(
                f"host_memory is {text} ({format_bytes(given)}), and {format_bytes(available)} is available here; give "
                "less, or close other programs"
            )
        smallest = self._arenas(self._smallest)
        if given < smallest:
            raise ResourceError(
                f"host_memory is {text} ({format_bytes(given)}), the smallest arenas of {self._what} take "
                f"{format_bytes(smallest)}: {sum(self._smallest)} slots of {format_bytes(self._slot_bytes)}; give at "
                "least that, fewer hosts, or convert with a smaller recipe"
            )
        return min(given, self._arenas(self._experts))

    def _arenas(self, slots: tuple[int, ...]) -> int:
        return _arenas(slots, self._experts, self._slot_bytes)

    def _slots_in(self, num_bytes: int) -> tuple[int, ...]:
        """As many slots as ``num_bytes`` hold, dealt to the hosts by their experts."""
        slots = list(self._smallest)
        smallest, full = self._arenas(self._smallest), self._arenas(self._experts)
        share = (num_bytes - smallest) / max(1, full - smallest)
        for host, (least, experts) in enumerate(zip(self._smallest, self._experts, strict=True)):
            slots[host] = min(experts, least + int(share * (experts - least)))
        while self._arenas(tuple(slots)) > num_bytes:  # headers are rounded up to pages
            slots[slots.index(max(slots))] -= 1
        for host in sorted(range(len(slots)), key=lambda i: slots[i] - self._experts[i]):
            while slots[host] < self._experts[host]:
                slots[host] += 1
                if self._arenas(tuple(slots)) > num_bytes:
                    slots[host] -= 1
                    break
        return tuple(slots)

    def _need(self, chunk: int, context: int) -> int:
        """Bytes of one sequence and its workspace."""
        return self._profile.sequence.kv_bytes(context, chunk) + self._profile.workspace_bytes(chunk, context)

    def _limits(self, memory: int, is_capped: bool) -> tuple[GenerationLimits, int]:
        """The chunk, the context and the KV budget that ``memory`` bytes allow, and the workspace."""
        chunk = self._chunk(memory, is_capped)
        context = _largest(self._least, self._wanted, lambda n: self._need(chunk, n) <= memory)
        workspace = self._profile.workspace_bytes(chunk, context)
        kv = min(NUM_SEQUENCES * self._profile.sequence.kv_bytes(context, chunk), memory - workspace)
        return GenerationLimits(context, chunk, kv, self._profile.sequence), workspace

    def _chunk(self, memory: int, is_capped: bool) -> int:
        fitting = [chunk for chunk in CHUNKS if self._need(chunk, self._least) <= memory]
        usual = max(chunk for chunk in fitting if chunk <= CHUNK)
        if not is_capped or not self._profile.sequence.can_chunk:
            return usual
        share = (self._device if self._on_device else self._room) // _CHUNK_SHARE
        return max([usual, *(c for c in fitting if self._profile.workspace_bytes(c, self._least) <= share)])

    def _explain(self, given: int | None) -> str:
        profile, chunk = self._profile, CHUNKS[0]
        model = [
            ("trunk", profile.trunk_bytes),
            (f"the KV cache of {self._least} tokens", profile.sequence.kv_bytes(self._least, chunk)),
            ("workspace", profile.workspace_bytes(chunk, self._least)),
        ]
        smallest = self._arenas(self._smallest)
        arena = ("the smallest arenas", smallest) if given is None else ("arenas (host_memory)", given)
        host = [("Ray and the processes", self._processes), arena]
        if self._on_device and sum(size for _, size in model) > self._device:
            return _sentence(self._what, model, self._device, "free on the GPU", "--context, --device-memory")
        parts = host if self._on_device else [*model, *host]
        remedy = "--context" if given is None else "--host-memory or --context"
        return _sentence(self._what, parts, self._budgets.available_bytes, "of memory are free", remedy)


def _sentence(what: str, parts: list[tuple[str, int]], free: int, where: str, options: str) -> str:
    listed = ", ".join(f"{format_bytes(size)} {name}" for name, size in parts)
    return (
        f"{what} needs {format_bytes(sum(size for _, size in parts))} ({listed}), {format_bytes(free)} {where}; "
        f"close other programs, give a smaller {options}, convert with a smaller recipe (--recipe), or use a machine "
        "with more memory"
    )


def _largest(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest n of ``least`` to ``most`` that fits, if ``least`` does and what fits has an end."""
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def _arenas(slots: Sequence[int], experts: Sequence[int], slot_bytes: int) -> int:
    """Bytes of all arenas: slots, and a header with an entry for each slot and expert."""
    headers = (round_up(64 + 64 * (s + e), ALIGNMENT) for s, e in zip(slots, experts, strict=True))
    return sum(headers) + sum(slots) * slot_bytes

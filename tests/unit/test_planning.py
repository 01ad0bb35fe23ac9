"""Plans of memory: sizes in words, the rule, and what is refused. Pure: no model is loaded."""

from __future__ import annotations

import random

import pytest

from moray.runtime.errors import ConfigError, ResourceError
from moray.runtime.planning.plan import Budgets, MemoryPlan, describe, least_slots, plan_memory
from moray.runtime.planning.profile import CHUNKS, ModelProfile, SequenceMemory, Workspace, decode_profile
from moray.runtime.planning.sizes import parse_bytes

MIB, GIB = 1 << 20, 1 << 30
SLOT = 100 * MIB
#: 32 layers of 8 KV heads of 128 in float32, as Mixtral has them.
SEQUENCE = SequenceMemory(0, 256 << 10, (), can_chunk=True)
PROFILE = ModelProfile(GIB, 32768, SEQUENCE, Workspace(50e6, 400e3, 40e3, 3.0))


def plan(
    available: int, experts: tuple[int, ...] = (256,), profile: ModelProfile = PROFILE, **given: object
) -> MemoryPlan:
    made = plan_memory(profile, SLOT - 5, experts, Budgets(available, **given), "the store s")
    made.validate()
    return made


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("8GB", 8 * 10**9),
        ("8192MiB", 8 * GIB),
        (" 1.5 kib", 1536),
        ("77", 77),
        ("80%", 800),
        ("100%", 1000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text, 1000) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *[
            (text, "expected a size above 0 such as 8GiB")
            for text in ("", "much", "-5MB", "GiB", "1e3", "nan%", "1GiB2")
        ],
        *[(text, "no memory at all") for text in ("0", "0%", "0.2B")],
        ("101%", "at most 100%"),
        ("3XB", "unit 'xb', expected B, KB"),
    ],
)
def test_sizes_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--host-memory is .*{message}"):
        parse_bytes(text, 1000, "--host-memory")


def test_a_share_of_nothing_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="unit '%'"):
        parse_bytes("80%")


# -------------------------------------------------------------------------------------- the profile


def test_windows_bound_what_a_sequence_holds() -> None:
    memory = SequenceMemory(7, 10, ((100, 3),), can_chunk=True)
    assert memory.kv_bytes(50, 16) == 7 + 13 * 50
    assert memory.kv_bytes(1000, 16) == 7 + 10_000 + 3 * 115  # the window, and the last piece of the prompt
    assert SequenceMemory(7, 10, ((100, 3),), can_chunk=False).kv_bytes(1000, 16) == 7 + 13_000


def test_a_profile_is_read_back() -> None:
    profile = ModelProfile(5, 9, SequenceMemory(1, 2, ((3, 4),), can_chunk=False), Workspace(0.5, 1, 2, 3))
    assert decode_profile(profile.encode()) == profile
    for damaged in ("", "{}", "[]", profile.encode()[:-1]):
        with pytest.raises((ValueError, KeyError, TypeError)):
            decode_profile(damaged)


# ----------------------------------------------------------------------------------------- the rule


def test_everything_is_resident_if_it_fits() -> None:
    made = plan(128 * GIB, (128, 128))
    assert made.all_resident and made.slots == (128, 128) and made.slot_bytes == SLOT
    assert made.limits.context_length == 32768 and made.limits.chunk == 512
    assert made.kv_bytes == 8 * 32768 * (256 << 10)  # eight sequences of full length


def test_everything_is_resident_before_contexts_are_long() -> None:
    made = plan(32 * GIB)
    assert made.all_resident and 4096 <= made.limits.context_length < 32768
    assert made.available_bytes - made.host_bytes < MIB  # as much as fits


def test_what_does_not_fit_leaves_the_arenas_what_is_left() -> None:
    made = plan(20 * GIB)
    assert not made.all_resident and 2 < made.num_slots < 256
    assert made.kv_bytes + made.workspace_bytes <= (made.available_bytes - GIB) / 8
    spare = made.available_bytes - made.host_bytes
    assert made.available_bytes // 32 <= spare < made.available_bytes // 32 + SLOT + MIB


def test_the_arenas_are_as_large_as_told() -> None:
    made = plan(20 * GIB, (128, 128), host_memory="10GiB")
    assert 10 * GIB - SLOT < made.arena_bytes <= 10 * GIB
    assert abs(made.slots[0] - made.slots[1]) <= 1
    assert made.limits.chunk == 2048  # each chunk reads its experts again
    assert plan(64 * GIB, host_memory="100%").all_resident


def test_uneven_hosts_get_slots_by_their_experts() -> None:
    made = plan(20 * GIB, (200, 50, 1), host_memory="12GiB")
    assert made.slots[2] == 1 and made.slots[0] == pytest.approx(4 * made.slots[1], rel=0.1)


def test_the_smallest_legal_engine_is_planned_and_nothing_smaller() -> None:
    smallest = plan(8 * GIB, (128, 1), host_memory="301MiB")
    assert smallest.slots == (2, 1)
    with pytest.raises(ResourceError, match=r"host_memory is 299MiB .*3 slots of 100.0 MiB; give at least"):
        plan(8 * GIB, (128, 1), host_memory="299MiB")


def test_the_context_is_what_was_asked_for() -> None:
    made = plan(20 * GIB, context=10000)
    assert made.limits.context_length == 10000 and made.sequence_bytes == 10000 * (256 << 10)
    assert plan(20 * GIB, context=64).kv_bytes == 8 * 64 * (256 << 10)
    with pytest.raises(ConfigError, match="context is 32769, expected 2 to 32768"):
        plan(20 * GIB, context=32769)
    with pytest.raises(ResourceError, match=r"8\.0 GiB the KV cache of 32768 tokens"):
        plan(8 * GIB, context=32768)


def test_what_cannot_fit_is_refused_part_by_part() -> None:
    with pytest.raises(ResourceError) as refused:
        plan(2 * GIB)
    message = str(refused.value)
    for part in (
        "1.0 GiB trunk",
        "1.0 GiB the KV cache of 4096 tokens",
        "workspace",
        "956.0 MiB Ray",
        "200.",
        "2.0 GiB",
    ):
        assert part in message
    assert "--context" in message and "--recipe" in message and "\n" not in message
    with pytest.raises(ResourceError, match=r"6.0 GiB arenas .host_memory.*--host-memory or --context"):
        plan(7 * GIB, host_memory="6GiB")


def test_on_a_gpu_the_model_lies_on_the_device() -> None:
    made = plan(12 * GIB, device_bytes=8 * GIB)
    assert not made.all_resident and made.arena_bytes > 10 * GIB
    assert 4 * GIB < made.model_bytes <= 0.9 * 8 * GIB
    assert plan(12 * GIB, device_bytes=8 * GIB, device_memory="4GiB").model_bytes <= 4 * GIB
    with pytest.raises(ResourceError, match="free on the GPU"):
        plan(12 * GIB, device_bytes=8 * GIB, device_memory="2GiB")
    with pytest.raises(ConfigError, match="no GPU computes here"):
        plan(12 * GIB, device_memory="2GiB")


def test_every_plan_keeps_to_its_memory() -> None:
    """Random machines, models and budgets: a plan that is made is within them, and uses what it may."""
    rng, num_made = random.Random(5), 0
    for _ in range(400):
        windows = ((rng.choice([128, 4096]), rng.randrange(1, 10**5)),) if rng.random() < 0.5 else ()
        sequence = SequenceMemory(rng.randrange(10**8), rng.randrange(10**5), windows, rng.random() < 0.8)
        workspace = Workspace(rng.random() * 1e8, rng.random() * 1e6, rng.random() * 1e4, rng.random() * 100)
        profile = ModelProfile(rng.randrange(4 * GIB), rng.choice([512, 4096, 131072, 1 << 30]), sequence, workspace)
        experts = tuple(rng.randrange(1, 200) for _ in range(rng.randrange(1, 4)))
        given = {
            "host_memory": rng.choice([None, "3GiB", "50%"]),
            "context": rng.choice([None, 2, 500]),
            "device_bytes": rng.choice([None, 16 * GIB]),
        }
        try:
            made = plan(rng.randrange(2, 40) * GIB, experts, profile, **given)
        except ResourceError:
            continue
        num_made += 1
        assert made.limits.chunk in CHUNKS
        assert given["context"] in (None, made.limits.context_length)
        assert all(least_slots(e) <= s <= e for s, e in zip(made.slots, experts, strict=True))
        rows = {what: size for what, size, _ in describe(made)}
        assert sum(rows.values()) == made.processes_bytes + made.arena_bytes + made.model_bytes
    assert num_made > 200

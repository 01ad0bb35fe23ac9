from __future__ import annotations

import numpy as np
import pytest

from moray.runtime.arrays import Bytes
from moray.runtime.errors import CorruptShardError
from moray.runtime.layout.packed import PackedSpec
from moray.runtime.layout.shard import ALIGNMENT, ExpertKey, ShardLayout, build_shard, plan_layout, read_header

KEY = ExpertKey(3, 17)
TENSORS = [
    ("gate_up_proj", PackedSpec(96, 64, "q4", 64)),
    ("gate_up_proj_bias", 96),
    ("up_proj", PackedSpec(24, 320, "q2", 16, "u8")),
    ("down_proj", PackedSpec(64, 48, "f32")),
]


def make_shard() -> tuple[Bytes, ShardLayout, dict[str, Bytes]]:
    layout = plan_layout(TENSORS)
    rng = np.random.default_rng(0)
    data = {t.name: rng.integers(0, 256, t.num_bytes, dtype=np.uint8) for t in layout.tensors}
    return build_shard(KEY, layout, data), layout, data


def test_a_shard_tells_what_it_holds() -> None:
    shard, layout, data = make_shard()
    assert read_header(shard) == (KEY, layout)
    for tensor in layout.tensors:
        found = shard[tensor.offset : tensor.offset + tensor.num_bytes]
        np.testing.assert_array_equal(found, data[tensor.name])


def test_tensors_and_shards_are_aligned_and_do_not_overlap() -> None:
    _, layout, _ = make_shard()
    assert layout.num_bytes % ALIGNMENT == 0
    end = 0
    for tensor in layout.tensors:
        assert tensor.offset % 64 == 0 and tensor.offset >= end
        end = tensor.offset + tensor.num_bytes
    assert end <= layout.num_bytes


def test_the_layout_does_not_depend_on_the_expert() -> None:
    _, layout, data = make_shard()
    for key in (ExpertKey(0, 0), ExpertKey(10_000, 2**20)):
        assert read_header(build_shard(key, layout, data)) == (key, layout)


@pytest.mark.parametrize("position", ["header_end", "middle", "end"])
def test_a_flipped_bit_is_found(position: str) -> None:
    shard, layout, _ = make_shard()
    shard[{"header_end": layout.header_end, "middle": shard.nbytes // 2, "end": shard.nbytes - 1}[position]] ^= 1
    with pytest.raises(CorruptShardError, match="checksum"):
        read_header(shard)


def test_a_damaged_header_is_found() -> None:
    shard, _, _ = make_shard()
    shard[16] = 0xC1  # never used by msgpack
    with pytest.raises(CorruptShardError, match="header"):
        read_header(shard)


@pytest.mark.parametrize("num_bytes", [0, 8, 4096])
def test_other_bytes_are_not_a_shard(num_bytes: int) -> None:
    with pytest.raises(CorruptShardError, match="not a shard"):
        read_header(np.zeros(num_bytes, dtype=np.uint8))


def test_tensors_are_found_by_name() -> None:
    layout = plan_layout(TENSORS)
    assert layout["gate_up_proj_bias"].length == 96
    assert layout.get("down_proj") == layout["down_proj"] and layout.get("up_proj_bias") is None
    with pytest.raises(KeyError):
        layout["up_proj_bias"]

"""The lanes, and the resources that they take time of."""

from __future__ import annotations

from enum import IntEnum

from moray.runtime.errors import ConfigError


class Lane(IntEnum):
    """A way to get one expert's output.

    There is none that fetches the shard from another host while the layer waits: activations are less. A shard is as
    much as those of 257 tokens of one expert of Qwen3-30B-A3B (hqq4:64), and of 4,800 of Mixtral; a prompt's chunk of
    512 gives an expert 32 and 128. What is used again and again is copied in the background (prefetch/replication.py).
    """

    DEVICE_HIT = 0  # the shard is on the device: compute there
    DEVICE_COPY = 1  # copy the shard from the arena to the device, compute there, keep it
    HOST_CPU = 2  # compute in place, in the arena
    DISK_LOAD = 3  # read the shard into the arena, then compute in place
    REMOTE_COMPUTE = 4  # send the activations to a host that has the shard


class Resource(IntEnum):
    """What works beside the others. Each remote host has two more: see ``network`` and ``remote_cpu``."""

    CPU = 0  # the kernels, reading the arena
    DEVICE = 1  # the device's computing, reading its own memory
    LINK = 2  # copies from the arena to the device
    DISK = 3


_NUM_LOCAL = len(Resource)
#: Those that read or write this machine's memory, and so slow each other down.
BUS = (Resource.CPU, Resource.LINK, Resource.DISK)
AUTO = "auto"
#: What ``lanes=`` may be besides "auto": where experts that are in the arena are computed.
FORCED = {"device-copy": Lane.DEVICE_COPY, "host-cpu": Lane.HOST_CPU}


def network(remote: int) -> int:
    """What the way to a remote host and back costs: fixed for each request, and for each byte."""
    return _NUM_LOCAL + 2 * remote


def remote_cpu(remote: int) -> int:
    """The resource that is a remote host, from its request to its reply."""
    return _NUM_LOCAL + 2 * remote + 1


def parse_lanes(text: str) -> Lane | None:
    """The lane that ``lanes=`` forces, None for "auto". Raises ConfigError."""
    if text == AUTO:
        return None
    if text not in FORCED:
        raise ConfigError(f"lanes is {text!r}; use {AUTO}, {' or '.join(FORCED)}")
    return FORCED[text]

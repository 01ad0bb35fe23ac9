"""What placement is worth: two throttled machines, the split it chooses, and the best split found by trying.

    python benchmarks/placement.py

Two processes are put into CPU and memory groups (cgroup v1, root), CPU time 3:1 and memory 3:1, then 1:1. One is the
compute node, the other a host that it reaches through the real data plane (loopback TCP with TLS). Both are measured
as a joining node is, the experts are placed by these measurements, and a model of random weights generates under that
placement and under other splits that memory allows, in turns. Throughput: decoded tokens a second, medians. The texts
must be the same. Quotas are given in periods of 5 ms: a stall at the end of a period would else be longer than a layer.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

from common import describe_machine, print_table, working_directory
from geometry import Geometry
from make_store import write_store
from memory_group import memory_group
from two_machines import Worker

from moray.cluster.keys import KeyPair
from moray.cluster.layer_cost import LayerGeometry, geometry_of
from moray.cluster.place import place
from moray.cluster.placement import HostSpec, Placement, all_keys
from moray.cluster.predict import Trunk, predict
from moray.cluster.topology import ComputeSpeed, LinkReport
from moray.runtime.convert.recipe import Recipe
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.planning.profiles import profile_of
from moray.runtime.store.store import Store

_CPU, _PERIOD_US = Path("/sys/fs/cgroup/cpu"), 5000
_PROCESS_BYTES = 900 << 20  # besides the arena
_CHOSEN = -1  # in place of a number of remote experts: what ``place`` says
GEOMETRIES = {
    "coarse": Geometry(2048, 7168, experts=8, layers=3, vocab=1024, active=2),
    "fine": Geometry(1024, 1024, experts=64, layers=4, vocab=1024, active=8),
}


@dataclass(frozen=True)
class Setting:
    """``cores``: of CPU time, of the compute node and the other. ``memory``: of all experts, what each can hold."""

    cores: tuple[float, float]
    memory: tuple[float, float]


SETTINGS = {
    "3:1": Setting((1.2, 0.4), (1.0, 1 / 3)),
    "1:1": Setting((0.8, 0.8), (0.75, 0.75)),
}


@contextmanager
def cpu_group(name: str, cores: float) -> Iterator[Path]:
    """A group of processes that get so many cores' worth of time."""
    path = _CPU / f"moray-benchmark-{os.getpid()}-{name}"
    try:
        path.mkdir()
    except OSError as error:
        raise SystemExit(f"cannot make the CPU cgroup {path}: {error.strerror}; it needs root and cgroup v1") from error
    try:
        (path / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (path / "cpu.cfs_quota_us").write_text(str(int(cores * _PERIOD_US)))
        yield path
    finally:
        for _ in range(50):  # a process that ended leaves its group a little later
            try:
                path.rmdir()
                break
            except OSError:
                sleep(0.1)


class Machine:
    """A worker process in its groups."""

    def __init__(
        self, stack: ExitStack, name: str, store: Path, cores: float, slots: int, keys: KeyPair, admitted: str
    ) -> None:
        self.server_key = keys.public
        cpu = stack.enter_context(cpu_group(name, cores))
        memory = stack.enter_context(memory_group(name))
        with Store.open(store) as opened:
            memory.limit(slots * opened.manifest.slot_bytes + _PROCESS_BYTES)
        self._worker = Worker()
        stack.callback(self._worker.close)
        (cpu / "cgroup.procs").write_text(str(self._worker.pid))
        memory.add(self._worker.pid)
        given = {"threads": ceil(cores), "slots": slots, "keys": [keys.public, keys.secret]}
        self._worker(store=str(store), admitted=admitted, **given)

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        return self._worker(do=do, **arguments)


class Pair:
    """The compute node and the other machine."""

    def __init__(self, stack: ExitStack, store: Path, setting: Setting, slots: tuple[int, int]) -> None:
        keys = KeyPair.make(), KeyPair.make()
        self.here, self.there = (
            Machine(stack, name, store, cores, count, own, other.public)
            for name, cores, count, own, other in zip(
                ("here", "there"), setting.cores, slots, keys, keys[::-1], strict=True
            )
        )

    def hold(self, placement: Placement) -> None:
        self.here("hold", assigned=placement.assigned("here"), address=f"ipc://@moray-placement-{os.getpid()}")
        found = self.there("hold", assigned=placement.assigned("there"), address="tcp://127.0.0.1:0")
        self.there_at = {"address": found["address"], "server_key": self.there.server_key}


def splits(layers: Sequence[LayerGeometry], slots: tuple[int, int], number: int) -> Iterator[tuple[int, Placement]]:
    """Placements with the same number of remote experts in each layer, as far as memory allows: at most ``number``."""
    experts, depth = layers[0].num_experts, len(layers)
    least, most = max(0, experts - slots[0] // depth), min(experts, slots[1] // depth)
    step = max(1, (most - least) // (number - 1))
    for remote in range(least, most + 1, step):
        yield remote, Placement({key: "there" if key.expert < remote else "here" for key in all_keys(layers)})


def compare(name: str, setting: str, store: Path, tokens: int, rounds: int) -> list[str]:
    """Measure one geometry under one setting. Returns a row of the table."""
    profile = profile_of(store)
    with Store.open(store) as opened:
        manifest = opened.manifest
    layers, total = geometry_of(manifest, profile.top_k), len(manifest.shards)
    here, there = (int(share * total) for share in SETTINGS[setting].memory)
    with ExitStack() as stack:
        pair = Pair(stack, store, SETTINGS[setting], (here, there))
        reports = pair.here("measure"), pair.there("measure")
        pair.hold(Placement({ExpertKey(0, 0): "here", ExpertKey(0, 1): "there"}))
        link = LinkReport(**pair.here("link", **pair.there_at))
        speeds = [ComputeSpeed(**report["compute"]) for report in reports]
        hosts = [HostSpec("here", here, speeds[0]), HostSpec("there", there, speeds[1], link)]
        chosen = place(layers, hosts)
        rates: dict[int, list[float]] = {}
        texts = set()
        for _ in range(rounds):
            for remote, placement in [(_CHOSEN, chosen), *splits(layers, (here, there), 7)]:
                pair.hold(placement)
                found = pair.here("run", **pair.there_at, tokens=tokens, runs=3)
                rates.setdefault(remote, []).append(median(found["rates"]))
                texts.add(tuple(found["ids"]))
    if len(texts) != 1:
        raise SystemExit(f"{name}, {setting}: {len(texts)} different texts; placement must not change them")
    medians = {remote: median(each) for remote, each in rates.items()}
    best = max((rate, remote) for remote, rate in medians.items() if remote != _CHOSEN)
    trunk = Trunk(len(layers), profile.bytes_per_token)
    predicted = predict(layers, trunk, hosts, chosen, reports[0]["disk_bytes_per_s"]).decode_tokens_per_s
    print(
        f"{name}, {setting}: computing {speeds[0].bytes_per_s / 1e9:.1f} and {speeds[1].bytes_per_s / 1e9:.1f} GB/s, "
        f"link {1e3 * link.latency_s:.2f} ms, {link.bytes_per_s / 1e6:.0f} MB/s; tokens/s by remote experts a layer: "
        + ", ".join(f"{remote}: {rate:.1f}" for remote, rate in sorted(medians.items()) if remote != _CHOSEN),
        flush=True,
    )
    primaries = sum(host == "there" for host in chosen.primary.values()) / len(layers)
    return [
        f"{name}, {setting}", f"{primaries:.1f} + {len(chosen.replicas) / len(layers):.1f}", f"{medians[_CHOSEN]:.1f}",
        f"{best[1]}", f"{best[0]:.1f}", f"{medians[_CHOSEN] / best[0]:.2f}", f"{predicted:.1f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60, help="in each run (60)")
    parser.add_argument("--rounds", type=int, default=3, help="how often every split is run, in turns (3)")
    parser.add_argument("--only", choices=GEOMETRIES, help="one geometry")
    arguments = parser.parse_args()
    print(describe_machine())
    rows = []
    for name, geometry in GEOMETRIES.items():
        if arguments.only not in (None, name):
            continue
        with working_directory(int(0.7 * geometry.num_parameters)) as directory:
            store = write_store(directory / "store", geometry, Recipe.parse("experts=hqq4:64"))
            for setting in SETTINGS:
                rows.append(compare(name, setting, store, arguments.tokens, arguments.rounds))
    header = (
        "experts, throttled",
        "remote + replicas",
        "tokens/s",
        "best remote",
        "tokens/s",
        "of the best",
        "predicted",
    )
    print_table(header, rows)


if __name__ == "__main__":
    main()

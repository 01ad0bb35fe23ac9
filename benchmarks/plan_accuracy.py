"""What `moray plan` predicts for two machines, and what they do: tokens a second with half of the experts remote.

    python benchmarks/plan_accuracy.py                   # as root; some minutes

Two network namespaces with a veth link that `tc tbf` shapes to 1 and 10 Gbit/s. In each a process with one core of its
own: the compute node, which has half of every layer's experts, and a remote host with the others. Models of a few
layers of random weights, whose routers choose experts at random (make_store.py --routing random):

- *coarse*: Mixtral 8x7B's layers, 8 experts of 4096 x 14336, 2 a token;
- *fine*: Qwen3-30B-A3B's, 128 experts of 2048 x 768, 8 a token.

Nodes are measured as when they join, both at once, and the link over the data plane; *predicted* is what the plan's own
code (cluster/predict.py) makes of that. *measured*: decoded tokens a second, greedy, batch 1: the median of ``--runs``
runs of ``--tokens`` tokens after one that is not counted. *error*: measured / predicted - 1; the target is 15 %.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from common import describe_machine, print_table, working_directory
from geometry import PRESETS
from make_store import write_store
from routing import replay_of
from two_machines import Worker, namespaces

from moray.cluster.keys import KeyPair
from moray.cluster.layer_cost import geometry_of
from moray.cluster.placement import HostSpec, Placement, all_keys
from moray.cluster.predict import Prediction, Trunk, predict
from moray.cluster.topology import ComputeSpeed, LinkReport
from moray.runtime.convert.recipe import DEFAULT_RECIPE, Recipe
from moray.runtime.planning.profiles import profile_of
from moray.runtime.store.store import Store

GEOMETRIES = {
    "coarse": replace(PRESETS["mixtral-8x7b"], layers=2, vocab=2048),
    "fine": replace(PRESETS["qwen3-30b-a3b"], layers=4, vocab=2048),
}
LINKS_GBIT = (1.0, 10.0)
TARGET = 0.15
_PROMPT = 8  # tokens of placement_worker.py's


@dataclass(frozen=True)
class Found:
    """Of one model over one link."""

    speeds: list[ComputeSpeed]
    link: LinkReport
    prediction: Prediction
    rates: list[float]
    times: dict[str, float]  # s of a layer call
    misses: float  # experts read from disk, a layer call

    @property
    def error(self) -> float:
        return median(self.rates) / self.prediction.decode_tokens_per_s - 1


def measure(store: Path, gbit: float, tokens: int, runs: int) -> Found:
    """Predict, then run."""
    profile = profile_of(store)
    with Store.open(store) as opened:
        manifest = opened.manifest
    layers = geometry_of(manifest, profile.top_k)
    placement = Placement({key: ("here", "there")[key.expert % 2] for key in all_keys(layers)})
    slots, keys = len(manifest.shards) // 2, (KeyPair.make(), KeyPair.make())
    with ExitStack() as stack:
        sides = stack.enter_context(namespaces(gbit))
        workers = []
        for core, (name, _) in enumerate(sides):
            workers.append(Worker(["ip", "netns", "exec", name, "taskset", "-c", str(core)]))
            stack.callback(workers[-1].close)
        for worker, own, other in zip(workers, keys, keys[::-1], strict=True):
            admitted = [own.public, own.secret]
            worker(store=str(store), threads=1, slots=slots, keys=admitted, admitted=other.public)
        here, there = workers
        for worker in workers:  # both at once, as when an engine asks its nodes
            worker.tell(do="measure")
        reports = [worker.answer() for worker in workers]
        here(do="hold", assigned=placement.assigned("here"), address=f"ipc://@moray-plan-{os.getpid()}")
        address = there(do="hold", assigned=placement.assigned("there"), address=f"tcp://{sides[1][1]}:0")["address"]
        at = {"address": address, "server_key": keys[1].public}
        link = LinkReport(**here(do="link", **at))
        speeds = [ComputeSpeed(**report["compute"]) for report in reports]
        hosts = [HostSpec("here", slots, speeds[0]), HostSpec("there", slots, speeds[1], link)]
        trunk = Trunk(len(layers), profile.bytes_per_token, profile.sequence.kv_bytes(_PROMPT + tokens // 2, 512))
        prediction = predict(layers, trunk, hosts, placement, reports[0]["disk_bytes_per_s"])
        run = here(do="run", **at, tokens=tokens, runs=runs)
        return Found(speeds, link, prediction, run["rates"], run["times"], run["misses"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=GEOMETRIES, help="one geometry")
    parser.add_argument("--store", type=Path, help="keep stores here, and use those that are there")
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("found one core, expected two: one for each machine")
    print(describe_machine())
    rows = []
    for name, geometry in GEOMETRIES.items():
        if arguments.only not in (None, name):
            continue
        with ExitStack() as stack:
            folder = arguments.store or stack.enter_context(working_directory(int(0.7 * geometry.num_parameters)))
            store = folder / name
            if not store.exists():
                write_store(store, geometry, Recipe.parse(DEFAULT_RECIPE), replay=replay_of("random", geometry))
            for gbit in LINKS_GBIT:
                rows.append(report(f"{name}, {gbit:g} Gbit/s", measure(store, gbit, arguments.tokens, arguments.runs)))
    header = ("model, link", "predicted", "of it trunk ms", "experts ms", "measured", "error", "15 %")
    print_table(header, rows)


def report(name: str, found: Found) -> tuple[str, ...]:
    """Print the measurements; a row of the table."""
    speeds = " and ".join(f"{speed.bytes_per_s / 1e9:.1f}" for speed in found.speeds)
    print(
        f"{name}: computing {speeds} GB/s, link {1e3 * found.link.latency_s:.2f} ms, "
        f"{found.link.bytes_per_s / 1e6:.0f} MB/s; ms of a layer's experts: "
        + ", ".join(f"{part} {1e3 * seconds:.2f}" for part, seconds in found.times.items())
        + f"; read from disk {found.misses:.3f} experts a layer",
        flush=True,
    )
    prediction = found.prediction
    return (
        name, f"{prediction.decode_tokens_per_s:.1f}", f"{1e3 * prediction.trunk_s:.2f}",
        f"{1e3 * prediction.experts_s:.2f}", f"{median(found.rates):.1f}", f"{100 * found.error:+.0f} %",
        "met" if abs(found.error) <= TARGET else "missed",
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""Peak memory and disk of a conversion from a hub: are they what `moray convert` announced?

    python benchmarks/convert_peaks.py                       # a generated checkpoint of 10 GiB, in 25 GiB of disk
    python benchmarks/convert_peaks.py --gib 0.5 --only stream

What it does: writes a random Mixtral checkpoint of about so many GiB (make_checkpoint.py: files of at most 1 GiB, or
a tenth of it), serves it on loopback (tests/helpers/hub.py), and runs `moray convert ORG/NAME STORE` in a process of
its own with an empty cache, once as it is and once with `--stream`.

What it measures, every 20 ms: *memory*, RssAnon (private memory that the kernel cannot drop) of the command and its
workers, added up; *disk*, blocks of all files in the store's directory and in huggingface_hub's cache. *announced*:
what the command said before it started. *ratio*: measured peak / announced; the goal is 0.9 to 1.1.
*limit* of memory: 330 MiB a process (Python, torch, transformers, buffers), and a worker the largest part of the
trunk or 4 experts, as in the checkpoint; of disk with --stream: the finished store and the largest file. Exit status 1
if a ratio or a limit is exceeded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from common import describe_machine, print_table, working_directory
from geometry import PRESETS, Geometry
from make_checkpoint import write_checkpoint
from sampling import Sampling, private_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.hub import local_hub

INTERVAL_S = 0.02
NAME = "benchmark/random-mixtral"
_GOAL = (0.9, 1.1)
_ANNOUNCE = """
import sys
from moray.runtime.convert.hub_convert import convert_from_hub
def announce(needs):
    print(needs.memory_bytes, needs.disk_bytes + needs.cache_bytes, needs.workers, flush=True)
if __name__ == "__main__":
    convert_from_hub(sys.argv[1], sys.argv[2], sys.argv[3], stream=sys.argv[4] == "stream", announce=announce,
                     workers=int(sys.argv[5]) or None)
"""


@dataclass(frozen=True)
class Peaks:
    """One conversion. Bytes."""

    mode: str
    workers: int
    seconds: float
    announced_memory: int
    memory: int
    limit_memory: int
    announced_disk: int
    disk: int
    limit_disk: int | None
    store: int
    largest_file: int

    @property
    def ratios(self) -> tuple[float, float]:
        return self.memory / self.announced_memory, self.disk / self.announced_disk

    @property
    def met(self) -> bool:
        held = all(_GOAL[0] <= ratio <= _GOAL[1] for ratio in self.ratios)
        within = self.memory <= self.limit_memory and (self.limit_disk is None or self.disk <= self.limit_disk)
        return held and within


class Peak(Sampling):
    """The largest value that a function has returned, in a thread."""

    def __init__(self, measure: Callable[[], int]) -> None:
        super().__init__(INTERVAL_S)
        self._measure = measure
        self.peak = 0

    def sample(self) -> None:
        self.peak = max(self.peak, self._measure())


def private_bytes_below(root: int) -> int:
    """RssAnon of a process and all below it."""
    try:
        process = psutil.Process(root)
        pids = [root, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    return sum(private_bytes(pid) for pid in pids)


def disk_bytes(folders: list[Path]) -> int:
    total = 0
    for folder in folders:
        for root, _, files in os.walk(folder):
            for name in files:
                try:
                    total += os.lstat(os.path.join(root, name)).st_blocks * 512
                except FileNotFoundError:
                    continue  # deleted meanwhile
    return total


def geometry_of_size(gib: float) -> Geometry:
    """Mixtral-like: 8 experts a layer, as many layers as make about ``gib`` of bfloat16."""
    base = PRESETS["4gib"] if gib >= 4 else PRESETS["1gib"]
    base = replace(base, experts=8, vocab=8192)
    if gib < 4:
        base = replace(base, hidden=1024, intermediate=3584)
    one, two = (2 * replace(base, layers=count).num_parameters for count in (1, 2))
    return replace(base, layers=max(1, round(1 + (gib * 2**30 - one) / (two - one))))


def measure(root: Path, checkpoint: Path, geometry: Geometry, mode: str, recipe: str, workers: int) -> Peaks:
    cache, store = root / f"cache-{mode}", root / f"store-{mode}"
    with local_hub() as hub:
        hub.add(NAME, checkpoint)
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache),
        }
        command = [sys.executable, "-c", _ANNOUNCE, NAME, str(store), recipe, mode, str(workers)]
        start = time.perf_counter()
        with (
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child,
            Peak(lambda: private_bytes_below(child.pid)) as memory,
            Peak(lambda: disk_bytes([cache, store])) as disk,
        ):
            assert child.stdout is not None
            line = child.stdout.readline()
            status = child.wait()
        seconds = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"the conversion ended with status {status}")
    announced_memory, announced_disk, used = map(int, line.split())
    files = [path.stat().st_size for path in checkpoint.glob("*.safetensors")]
    expert = 2 * 3 * geometry.hidden * geometry.intermediate
    part = 2 * geometry.vocab * geometry.hidden
    idle = 330 << 20
    limit = idle * (used + (used > 1)) + used * max(4 * expert, part)
    store_size = disk_bytes([store])
    limit_disk = store_size + max(files) if mode == "stream" else None
    return Peaks(
        mode,
        used,
        seconds,
        announced_memory,
        memory.peak,
        limit,
        announced_disk,
        disk.peak,
        limit_disk,
        store_size,
        max(files),
    )


def print_peaks(found: list[Peaks]) -> None:
    header = ("mode", "workers", "seconds", "what", "announced, MiB", "measured, MiB", "ratio", "limit, MiB")
    rows = []
    for peaks in found:
        memory, disk = peaks.ratios
        first = (peaks.mode, str(peaks.workers), f"{peaks.seconds:.0f}")
        rows.append(
            (
                *first,
                "memory",
                _mib(peaks.announced_memory),
                _mib(peaks.memory),
                f"{memory:.3f}",
                _mib(peaks.limit_memory),
            )
        )
        rows.append(
            (*first, "disk", _mib(peaks.announced_disk), _mib(peaks.disk), f"{disk:.3f}", _mib(peaks.limit_disk))
        )
    print_table(header, rows)
    print(f"\nstore {_mib(found[0].store)} MiB, largest file {_mib(found[0].largest_file)} MiB")


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"


def run(gib: float, modes: list[str], recipe: str, workers: int) -> list[Peaks]:
    geometry = geometry_of_size(gib)
    size = 2 * geometry.num_parameters
    with working_directory(int(2.5 * size)) as root:
        checkpoint = write_checkpoint(root / "checkpoint", geometry, file_bytes=min(1 << 30, size // 10))
        found = []
        for mode in modes:
            found.append(measure(root, checkpoint, geometry, mode, recipe, workers))
            subprocess.run(["rm", "-rf", str(root / f"cache-{mode}"), str(root / f"store-{mode}")], check=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=10.0, help="size of the checkpoint (10)")
    parser.add_argument("--only", choices=("keep", "stream"))
    parser.add_argument("--recipe", default="hqq4")
    parser.add_argument("--workers", type=int, default=0, help="of the converter; 0: its own choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    modes = [arguments.only] if arguments.only else ["keep", "stream"]
    found = run(arguments.gib, modes, arguments.recipe, arguments.workers)
    if arguments.json:
        print(json.dumps([asdict(peaks) | {"ratios": peaks.ratios, "met": peaks.met} for peaks in found], indent=2))
    else:
        print(f"{describe_machine()}\nrecipe {arguments.recipe}, about {arguments.gib:g} GiB\n")
        print_peaks(found)
    return 0 if all(peaks.met for peaks in found) else 1


if __name__ == "__main__":
    sys.exit(main())

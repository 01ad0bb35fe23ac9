"""Private memory of converting a checkpoint and of running it: does the compute process hold its trunk and little else?

    python benchmarks/memory.py                     # a generated 4 GiB checkpoint, in a temporary directory
    python benchmarks/memory.py --preset 1gib
    python benchmarks/memory.py /path/to/checkpoint

What it does: `moray convert CHECKPOINT STORE --recipe none` in a process of its own; then an engine with one expert
host on that store, which generates 8 tokens. Every 50 ms it reads the size of every process below this one.

What it measures: *private memory* is RssAnon of /proc/PID/status, anonymous pages that only this process has (heap,
stacks, tensors). It leaves out mapped files (RssFile), which the kernel drops when it needs room, and shared memory
(RssShmem), which is where the arena with the experts is: one copy, however many processes map it. *Peak* is the
largest sample from the process's start to its end. The converter is a command and its workers: the largest of these
processes counts, and their sum is printed beside it.

The limit is trunk + 600 MiB for the compute process (the trunk, Python with torch and transformers, compiled kernels,
KV cache and activations) and for a process of the converter, and 600 MiB for a host, whose experts lie in the arena.
Exit status 1 if one is exceeded. The converter's sum has no limit: it grows with the number of workers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from geometry import PRESETS
from make_checkpoint import write_checkpoint
from sampling import Sampling, private_bytes

INTERVAL_S = 0.05
OVERHEAD_BYTES = 600 << 20
_PROMPT = list(range(1, 65))


@dataclass(frozen=True)
class Usage:
    """Peak private bytes of one kind of process, and what is allowed."""

    name: str
    peak_bytes: int
    limit_bytes: int | None = None

    @property
    def exceeded(self) -> bool:
        return self.limit_bytes is not None and self.peak_bytes > self.limit_bytes


@dataclass(frozen=True)
class Report:
    """Everything measured on one checkpoint."""

    checkpoint_bytes: int
    trunk_bytes: int
    expert_bytes: int
    arena_bytes: int
    usages: tuple[Usage, ...]

    @property
    def exceeded(self) -> list[Usage]:
        return [usage for usage in self.usages if usage.exceeded]


class Sampler(Sampling):
    """Samples the private memory of every process below one, in a thread."""

    def __init__(self, root: int) -> None:
        super().__init__(INTERVAL_S)
        self._root = psutil.Process(root)
        self.peaks: dict[int, int] = {}  # process id -> bytes
        self.peak_sum = 0
        self.num_samples = 0

    def sample(self) -> None:
        sizes = {process.pid: private_bytes(process.pid) for process in _descendants(self._root)}
        self.peak_sum = max(self.peak_sum, sum(sizes.values()))
        self.num_samples += 1
        for pid, size in sizes.items():
            self.peaks[pid] = max(self.peaks.get(pid, 0), size)


def _descendants(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def measure_conversion(checkpoint: Path, store: Path, workers: int | None) -> list[Usage]:
    """Convert with recipe none; workers None: the converter's own choice, one a core for big models."""
    command = [sys.executable, "-m", "moray.deploy.cli", "convert", str(checkpoint), str(store), "--recipe", "none"]
    command += [] if workers is None else ["--workers", str(workers)]
    with Sampler(os.getpid()) as sampler:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [
        Usage("converter, largest process", max(sampler.peaks.values()), _trunk_bytes(store) + OVERHEAD_BYTES),
        Usage(f"converter, {len(sampler.peaks)} processes together", sampler.peak_sum),
    ]


def measure_engine(store: Path, num_tokens: int) -> tuple[int, list[Usage]]:
    """Generate on one host. Returns the bytes of the arena, and the peaks of the compute process and the host."""
    import moray

    with Sampler(os.getpid()) as sampler, moray.launch(store, hosts=1, device="cpu") as engine:
        completion = engine.generate(_PROMPT, max_new_tokens=num_tokens)
        compute, hosts = engine.actors.compute_report, engine.actors.host_reports
    assert completion.usage.completion_tokens == num_tokens
    host_peak = max(sampler.peaks[host.pid] for host in hosts)
    usages = [
        Usage("compute process", sampler.peaks[compute.pid], _trunk_bytes(store) + OVERHEAD_BYTES),
        Usage("expert host", host_peak, OVERHEAD_BYTES),
    ]
    return sum(host.arena.num_bytes for host in hosts), usages


def _trunk_bytes(store: Path) -> int:
    from moray.runtime.store.store import Store

    with Store.open(store) as opened:
        return opened.manifest.trunk_bytes


def measure(checkpoint: Path, store: Path, *, num_tokens: int = 8, workers: int | None = None) -> Report:
    """Convert ``checkpoint`` to ``store`` and run it."""
    from moray.runtime.store.store import Store

    converter = measure_conversion(checkpoint, store, workers)
    arena_bytes, usages = measure_engine(store, num_tokens)
    with Store.open(store) as opened:
        manifest = opened.manifest
    checkpoint_bytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return Report(checkpoint_bytes, manifest.trunk_bytes, manifest.expert_bytes, arena_bytes, (*usages, *converter))


def print_report(report: Report) -> None:
    from common import print_table

    rows = [("checkpoint", report.checkpoint_bytes), ("trunk", report.trunk_bytes)]
    rows += [("experts", report.expert_bytes), ("arena (shared, one copy)", report.arena_bytes)]
    print_table(("size of", "MiB"), [(name, _mib(size)) for name, size in rows])
    print()
    print_table(
        ("peak private memory of", "MiB", "limit, MiB", "headroom, MiB", "peak / limit"),
        [_row(usage) for usage in report.usages],
    )


def _row(usage: Usage) -> tuple[str, ...]:
    if usage.limit_bytes is None:
        return usage.name, _mib(usage.peak_bytes), "-", "-", "-"
    left = usage.limit_bytes - usage.peak_bytes
    return (
        usage.name,
        _mib(usage.peak_bytes),
        _mib(usage.limit_bytes),
        _mib(left),
        f"{usage.peak_bytes / usage.limit_bytes:.2f}",
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


@contextmanager
def checkpoint_and_store(given: Path | None, preset: str) -> Iterator[tuple[Path, Path]]:
    """``given``, or a generated checkpoint, and where its store goes; what is made here is removed."""
    from common import working_directory

    size = 2 * PRESETS[preset].num_parameters
    if given is not None:
        size = sum(file.stat().st_size for file in given.glob("*.safetensors"))
    with working_directory((1 if given else 2) * size + (64 << 20)) as root:
        yield given or write_checkpoint(root / "checkpoint", PRESETS[preset]), root / "store"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="without one, a random one is generated")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="4gib", help="what to generate (4gib)")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--workers", type=int, help="of the converter; without it, its own choice")
    arguments = parser.parse_args()
    with checkpoint_and_store(arguments.checkpoint, arguments.preset) as (checkpoint, store):
        report = measure(checkpoint, store, num_tokens=arguments.tokens, workers=arguments.workers)
    print_report(report)
    for usage in report.exceeded:
        print(f"\n{usage.name} exceeds its limit")
    return 1 if report.exceeded else 0


if __name__ == "__main__":
    sys.exit(main())

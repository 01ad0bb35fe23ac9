"""What the benchmarks share: a model in this process, room to work in, and tables. Does not need Ray."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import transformers
from transformers import PreTrainedModel

from moray.runtime.device.tier import DeviceTier
from moray.runtime.experts.source import InProcessSource
from moray.runtime.generation.runner import Runner
from moray.runtime.kernels.isa import INSTRUCTION_SET
from moray.runtime.kernels.pool import set_num_threads
from moray.runtime.layout.packed import Numerics
from moray.runtime.memory import format_bytes, reuse_freed_memory
from moray.runtime.model.families import expert_modules
from moray.runtime.model.loader import load_model
from moray.runtime.store.store import Store


@contextmanager
def in_process(
    store: Path, numerics: Numerics = "int8", device: str = "cpu", *, slots: int | None = None, lanes: str = "auto"
) -> Iterator[Runner]:
    """A store generating in this process, its experts in private memory and on the device in so many ``slots``."""
    set_num_threads(len(os.sched_getaffinity(0)))
    reuse_freed_memory()
    with Store.open(store) as opened:
        source, model = InProcessSource(opened), load_model(opened, numerics, torch.device(device))
        _adapt_to_older_transformers(model)
        tier = None
        if slots is not None:
            tier = DeviceTier.of(opened.manifest, model.device, slots * opened.manifest.slot_bytes, lanes)
        runner = Runner(opened, source, model, numerics, tier=tier)
        try:
            yield runner
        finally:
            runner.close()
            source.close()


def _adapt_to_older_transformers(model: PreTrainedModel) -> None:
    """moray needs a newer transformers; machines lent for a GPU may have 5.17, which lacks just this flag."""
    for _, module in expert_modules(model):
        if not hasattr(module, "has_post_expert_norm"):
            module.has_post_expert_norm = False  # type: ignore[assignment]


@contextmanager
def working_directory(needed_bytes: int) -> Iterator[Path]:
    """A temporary directory with room for so much, removed afterwards."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed_bytes > free:
        raise SystemExit(
            f"{tempfile.gettempdir()} has {format_bytes(free)} free, this needs {format_bytes(needed_bytes)}; "
            "free some space, or set TMPDIR to another disk"
        )
    with tempfile.TemporaryDirectory(prefix="moray-benchmark-") as path:
        yield Path(path)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table; the first column is text, the others are numbers."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (header, rule, *rows):
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("| " + " | ".join([row[0].ljust(widths[0]), *numbers]) + " |")


def describe_machine() -> str:
    """One line: what the numbers were measured on."""
    memory = format_bytes(psutil.virtual_memory().total)
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {memory}, kernels {INSTRUCTION_SET}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

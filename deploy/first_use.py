"""The first use of a store's kernels: compiled in a process of its own, before the engine starts, with progress."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moray.runtime.kernels.cache import compiled_stamp, needed_kernels
from moray.runtime.layout.packed import Numerics
from moray.runtime.store.store import Store


def compile_for(store: Path, numerics: Numerics, console: Console) -> None:
    """Compile what is not in the cache yet. If that fails, the engine will say why when it starts."""
    with Store.open(store) as opened:
        specs = needed_kernels(opened.manifest)
    if compiled_stamp(specs, numerics).exists():
        return
    command = [sys.executable, "-P", "-m", "moray.runtime.kernels.compile", str(store), numerics]
    columns = (TextColumn("Compiling kernels, once on this machine:"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                done, total, what = line.split(maxsplit=2)
                progress.update(task, completed=int(done), total=int(total), description=what.strip(), refresh=True)

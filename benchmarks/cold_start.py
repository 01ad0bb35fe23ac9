"""From the command to the first token: where the time of a cold start goes, and against its target.

    python benchmarks/cold_start.py                      # the embedded model
    python benchmarks/cold_start.py STORE --prompt-tokens 64 --turns 3

*A turn*: the store's pages are dropped from the page cache; a new Python process launches an engine and asks for one
token after ``--prompt-tokens`` random ones. Times are seconds since the process was started (its own imports, Ray and
its end of the calls included), of the turn that took the median time to the first token:
- *driver*: imports of what `moray generate` imports;  *Ray*: ``ray.init`` has returned;
- *processes*: when each process of the session was created, and the CPU time it had used at the first token;
- *began, imported, loaded, ready*: the compute actor took its work, had torch and transformers, had the trunk, could
  generate;  *engine*: ``moray.launch`` has returned;  *first token*: the first event with a token came.
*Target*: 1.2 x (bytes needed / raw bandwidth) + 5 s. *Bytes needed*: of the trunk, and of the experts that were read or
computed for this token (each once). *Raw bandwidth*: disk.py, in the same run; 0 bytes a second counts as no limit.
*Floor*, each the median of as many turns: a process that imports torch and transformers as they are, and one that does
a bare ``ray.init`` with its defaults but no dashboard; and the bytes needed (8 GB at most) of memory that no process
had, each page of it written once by as many threads as there are cores: what a virtual machine may have to ask for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import time
from typing import Any

_ALLOWED, _EXTRA_S = 1.2, 5.0
_MOST_FRESH_BYTES = 8 * 10**9
_FLOORS = {
    "import torch, transformers": "import torch, transformers.modeling_utils",
    "ray.init": "import os; os.environ['RAY_AUTH_MODE'] = 'disabled'; import ray; "
    "ray.init(address='local', include_dashboard=False, log_to_driver=False, logging_level='ERROR')",
}


def _engine_turn(store: Path | None, prompt_tokens: int, threads: int | None) -> dict[str, Any]:
    """In a process of its own: seconds since ``started`` of everything there is to know."""
    started = float(os.environ["COLD_START_AT"])
    import numpy as np
    import psutil

    import moray.deploy.terminal  # noqa: F401  # as the command does
    from moray.cluster import ray_session
    from moray.deploy.config import make_config
    from moray.deploy.engine import Engine

    marks = {"driver": time() - started}
    start_local = ray_session.start_local

    def timed(*args: Any, **kwargs: Any) -> Any:
        session = start_local(*args, **kwargs)
        marks["Ray"] = time() - started
        return session

    ray_session.start_local = timed
    config = make_config({"store": store, "threads": threads, "device": "cpu", "hosts": 1})
    with Engine(config) as engine:
        marks["engine"] = time() - started
        from moray.runtime.store.store import Store

        with Store.open(config.store_path) as opened:
            manifest = opened.manifest
        vocabulary = json.loads((config.store_path / "config.json").read_text())["vocab_size"]
        prompt = np.random.default_rng(0).integers(3, vocabulary, prompt_tokens).tolist()
        events = engine.stream(prompt, max_new_tokens=1)
        next(event for event in events if event.token_ids)
        marks["first token"] = time() - started
        processes, created = [], psutil.Process().create_time()
        for process in psutil.Process().children(recursive=True):
            used = process.cpu_times()
            processes.append((process.create_time() - created, _name(process), used.user + used.system))
        times = engine.actors.compute_report.times
        for name in ("began", "imported", "loaded", "ready"):
            marks[name] = getattr(times, name) - started
        own = psutil.Process().cpu_times()
        processes.append((0.0, "this process", own.user + own.system))
        counts = engine.stats().experts
        shard = max(layer.layout.num_bytes for layer in manifest.layers)
        needed = manifest.trunk_bytes + counts.num_used * shard
    return {"marks": marks, "processes": sorted(processes), "bytes": needed}


def _name(process: Any) -> str:
    words = process.cmdline()
    if words and words[0].startswith("ray::"):
        return str(words[0])
    scripts = [Path(word).name for word in words if word.endswith((".py", "raylet", "gcs_server"))]
    return scripts[0] if scripts else str(process.name())


def _run(code: list[str], **variables: str) -> str:
    environment = os.environ | variables
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    child = subprocess.run([sys.executable, *code], capture_output=True, text=True, env=environment, check=False)
    if child.returncode:
        raise SystemExit(f"a turn failed:\n{child.stderr[-2000:]}")
    return child.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", help="none: the embedded model")
    parser.add_argument("--prompt-tokens", type=int, default=1)
    parser.add_argument("--threads", type=int, help="that compute; none: all cores")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the turns here")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps(_engine_turn(arguments.store, arguments.prompt_tokens, arguments.threads)))
        return
    from common import describe_machine  # not in the measured processes: it imports torch
    from disk import drop_cached, store_bandwidth

    from moray.deploy.config import demo_store

    store = arguments.store or demo_store()
    command = [__file__, "--engine", str(store.absolute()), "--prompt-tokens", str(arguments.prompt_tokens)]
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    turns, floors = [], {name: [] for name in _FLOORS}
    for _ in range(arguments.turns):
        drop_cached([path for path in store.iterdir() if path.is_file()])
        turns.append(json.loads(_run(command, COLD_START_AT=repr(time()))))
        for name, code in _FLOORS.items():
            floors[name].append(_run(["-c", f"import time; t = time.time(); {code}; print(time.time() - t)"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(turns, indent=1))
    print(f"{describe_machine()}\n")
    _print(turns, floors, store_bandwidth(store, 0.2, 1).bytes_per_s)


def _fresh_memory_s(num_bytes: int) -> float:
    """Seconds to get so many bytes of memory from the kernel, in a process of its own."""
    code = f"""if True:
        from concurrent.futures import ThreadPoolExecutor
        from time import perf_counter
        import os, numpy as np
        parts = np.array_split(np.empty({num_bytes}, np.uint8), count := len(os.sched_getaffinity(0)))
        def touch(part): part[::4096] = 1
        started = perf_counter()
        with ThreadPoolExecutor(count) as pool: list(pool.map(touch, parts))
        print(perf_counter() - started)"""
    return float(_run(["-c", code]))


def _print(turns: list[dict[str, Any]], floors: dict[str, list[str]], bandwidth: float) -> None:
    turns = sorted(turns, key=lambda turn: turn["marks"]["first token"])
    turn = turns[len(turns) // 2]
    rows = [(at, name, "") for name, at in turn["marks"].items()]
    rows += [(at, f"  process {name}", f"{used:.2f} s of CPU") for at, name, used in turn["processes"]]
    for at, name, note in sorted(rows):
        print(f"{at:7.2f} s  {name:32} {note}")
    first = [turn["marks"]["first token"] for turn in turns]
    target = _ALLOWED * turn["bytes"] / bandwidth + _EXTRA_S
    print(f"\nfirst token {median(first):.2f} s ({min(first):.2f}-{max(first):.2f}, {len(first)} turns)")
    needed = f"{turn['bytes'] / 1e6:.0f} MB / {bandwidth / 1e9:.2f} GB/s"
    print(f"target {target:.2f} s: {_ALLOWED} x {needed} + {_EXTRA_S:g} s")
    print(f"first token / target: {median(first) / target:.2f}")
    for name, seconds in floors.items():
        print(f"floor, {name}: {median(map(float, seconds)):.2f} s")
    fresh = min(turn["bytes"], _MOST_FRESH_BYTES)
    seconds = _fresh_memory_s(fresh)
    print(f"floor, fresh memory: {seconds * turn['bytes'] / fresh:.2f} s ({fresh / seconds / 1e9:.2f} GB/s)")


if __name__ == "__main__":
    main()

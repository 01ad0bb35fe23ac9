"""The memory plan of an engine on this machine: made before Ray starts, shown by ``info`` and ``doctor``."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from moray.cluster.placement import place_evenly
from moray.deploy.config import EngineConfig
from moray.runtime import memory
from moray.runtime.memory import format_bytes
from moray.runtime.planning.plan import Budgets, MemoryPlan, describe, plan_memory
from moray.runtime.planning.profiles import profile_of
from moray.runtime.store.store import Store

_FREE_ON_GPU = """
import torch
if torch.cuda.is_available():
    print(min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())))
"""


def plan_engine(path: Path, config: EngineConfig) -> MemoryPlan:
    """Plan an engine on this machine, as it is now. Raises MorayError: a bad store, or one that does not fit."""
    with Store.open(path) as store:
        manifest = store.manifest
    hosts = [str(index) for index in range(config.num_hosts)]
    experts = [len(keys) for keys in place_evenly(manifest, hosts).values()]
    device_bytes = None if config.device == "cpu" else _free_on_gpu()
    profile = profile_of(path, "cpu" if device_bytes is None else "cuda")
    budgets = Budgets(memory.available_memory(), config.host_memory, config.context, device_bytes, config.device_memory)
    plan = plan_memory(profile, manifest.slot_bytes, experts, budgets, f"the store {path}")
    limits = replace(plan.limits, max_running=config.max_running, speculation=config.speculation)
    return replace(plan, limits=limits)


def plan_rows(plan: MemoryPlan) -> dict[str, str]:
    """The plan in words, a few lines."""
    rows = {name: f"{format_bytes(size)}: {why}" for name, size, why in describe(plan)}
    taken = f"{format_bytes(plan.host_bytes)} of {format_bytes(plan.available_bytes)} available"
    if plan.device_bytes is not None:
        taken += f"; on the GPU {format_bytes(plan.model_bytes)} of {format_bytes(plan.device_bytes)}"
    return rows | {"together": taken}


def _free_on_gpu() -> int | None:
    """Free bytes of the GPU that torch would use; None: it would use none."""
    if not Path("/proc/driver/nvidia/version").exists():
        return None
    child = subprocess.run([sys.executable, "-c", _FREE_ON_GPU], capture_output=True, text=True)
    words = child.stdout.split()
    return int(words[-1]) if words else None

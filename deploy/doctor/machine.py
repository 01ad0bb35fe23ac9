"""Checks of the machine and of what is installed on it."""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from moray.deploy.doctor.check import Check, describe
from moray.runtime import cpu

DISTRIBUTION = "moray-moe"
MIN_PYTHON = (3, 11)
MIN_FREE_DISK_BYTES = 1 << 30
ENGINE_BYTES = 1 << 30  # Ray's processes, and Python with torch in each actor


def check_python() -> Iterator[Check]:
    version, system = platform.python_version(), platform.system()
    found = f"{version} on {system} {platform.machine()}"
    if system != "Linux":
        yield Check("python", "problem", found, "moray needs Linux (memfd and abstract sockets)")
    elif tuple(int(part) for part in version.split(".")[:2]) < MIN_PYTHON:
        wanted = ".".join(str(part) for part in MIN_PYTHON)
        yield Check("python", "problem", found, f"install Python {wanted} or newer and moray in it")
    else:
        yield Check("python", "ok", found)


def check_packages() -> Iterator[Check]:
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        remedy = "install it: `pip install -e .` in a checkout (`make demo` does so); Ray's workers need it too"
        yield Check("packages", "problem", f"{DISTRIBUTION} is not installed, only on Python's path", remedy)
        return
    versions: list[str] = []
    for text in requirements:
        version, problem = _judge_requirement(text)
        versions += [version] if version else []
        if problem:
            yield problem
    yield Check("packages", "ok", ", ".join(versions) or "none has the version it needs")


def _judge_requirement(text: str) -> tuple[str, Check | None]:
    """One requirement as ("name version", None) if it is met, ("", problem) if not, ("", None) if it is not ours."""
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        return "", None  # an extra, or another platform's
    remedy = f"pip install '{requirement}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "", Check("packages", "problem", f"{requirement.name} is not installed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        found = f"{requirement.name} {version}, expected {requirement.specifier}"
        return "", Check("packages", "problem", found, remedy)
    return f"{requirement.name} {version}", None


def check_cpu() -> Iterator[Check]:
    cores, quota = len(os.sched_getaffinity(0)), cpu.cpu_quota()
    found = f"{_cpu_model()}, {cores} of {os.cpu_count()} cores for this process"
    if quota is None or quota >= cores:
        yield Check("cpu", "ok", found)
    else:
        found += f", but its control group has the time of {quota:g}: engines take {cpu.usable_cores()} threads"
        yield Check("cpu", "warning", found, "raise the container's CPU limit to compute with more")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def check_memory() -> Iterator[Check]:
    import psutil

    from moray.runtime.memory import available_memory, format_bytes

    total, available = psutil.virtual_memory().total, available_memory()
    found = f"{format_bytes(available)} available of {format_bytes(total)}"
    if available < ENGINE_BYTES:
        needed = f"an engine needs {format_bytes(ENGINE_BYTES)} besides its model"
        yield Check("memory", "warning", found, f"{needed}; close other programs")
    else:
        yield Check("memory", "ok", found)


def check_arena() -> Iterator[Check]:
    from moray.runtime.arena import Arena

    arena = Arena.create(1, 1, 1 << 20)
    try:
        Arena.attach(arena.ref).close()  # as another process of this user would
    finally:
        arena.close()
    yield Check("arena", "ok", "shared memory (memfd) can be made, and mapped again through /proc")


def check_disk(store: Path | None) -> Iterator[Check]:
    from moray.runtime.memory import format_bytes

    wanted = (store or Path()).absolute()
    folder = next(path for path in (wanted, *wanted.parents) if path.is_dir())
    usage = shutil.disk_usage(folder)
    found = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)} at {folder}"
    if usage.free < MIN_FREE_DISK_BYTES:
        yield Check("disk", "warning", found, "make room: a conversion needs the size of its store, Ray some for logs")
    else:
        yield Check("disk", "ok", found)


def check_gpu() -> Iterator[Check]:
    import torch

    with warnings.catch_warnings(record=True) as caught:  # torch says here why it cannot use a GPU
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        reasons = [" ".join(str(warning.message).split()) for warning in caught]
        yield judge_no_gpu(Path("/proc/driver/nvidia/version").exists(), torch.version.cuda, reasons)
        return
    for index in range(torch.cuda.device_count()):
        yield _try_gpu(index)


def _try_gpu(index: int) -> Check:
    import torch

    from moray.runtime.device.kernels import why_not
    from moray.runtime.memory import format_bytes

    name = torch.cuda.get_device_name(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
        torch.ones(16, device=f"cuda:{index}").sum().item()
    except RuntimeError as error:
        remedy = "install the torch build that fits this GPU and its driver (pytorch.org), or use `--device cpu`"
        return Check("gpu", "problem", f"{name} does not compute: {describe(error)}", remedy)
    found = f"{name}, {format_bytes(free)} free of {format_bytes(total)}"
    reason = why_not(torch.device("cuda", index))
    if reason is None:
        return Check("gpu", "ok", f"{found}; Triton kernels compile and compute right")
    remedy = "Triton comes with torch's CUDA builds and needs a C compiler (gcc) and a GPU from Turing (2018) on"
    return Check("gpu", "warning", f"{found}; torch dequantizes experts, which is slow: {reason:.300}", remedy)


def judge_no_gpu(has_driver: bool, cuda_version: str | None, reasons: list[str]) -> Check:
    found = "none: experts and attention run on the CPU"
    if not has_driver:
        return Check("gpu", "ok", found)
    if cuda_version is None:
        remedy = "this torch is built for CPUs only; install its CUDA build (pytorch.org)"
    else:
        remedy = f"check that `nvidia-smi` works, its driver supports CUDA {cuda_version}, and CUDA_VISIBLE_DEVICES"
    found = "; ".join(["an NVIDIA driver is loaded, but torch cannot use a GPU", *reasons, found])
    return Check("gpu", "warning", found, remedy)

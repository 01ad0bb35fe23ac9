"""``moray doctor``: what is wrong with this machine, and what to do about it.

Each check imports what it needs itself, so that a broken installation is a finding and not a crash. The two that can
end the process outright (compiled kernels, Ray) run in a child process.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from moray.runtime.errors import MorayError, StoreError

DISTRIBUTION = "moray-moe"
MIN_PYTHON = (3, 11)
CHILD_TIMEOUT_S = 300.0  # compiling the kernels for the first time takes about 10 s, starting Ray about 5 s
RAY_ANSWER_TIMEOUT_S = 60.0
MIN_FREE_DISK_BYTES = 1 << 30
ENGINE_BYTES = 1 << 30  # Ray's processes, and Python with torch in each actor
_UNEXPECTED = "if this does not say enough, report it with the output of `moray doctor --json`"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding about this machine."""

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    remedy: str = ""


class ChildError(Exception):
    """A check's child process failed, died or did not answer."""


def run_checks(store: Path | None = None, *, start_ray: bool = True) -> Iterator[Check]:
    """Check this machine for a store (None: the embedded demonstration model), yielding each finding as it is made.

    Never raises: a check that fails is a problem. ``start_ray`` starts a local Ray session, which takes seconds.
    """
    checks: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("python", _check_python),
        ("packages", _check_packages),
        ("cpu", _check_cpu),
        ("instruction set", _check_instruction_set),
        ("kernels", _check_kernels),
        ("memory", _check_memory),
        ("arena", _check_arena),
        ("gpu", _check_gpu),
        ("ray", _check_ray),
        *([("ray session", _check_ray_session)] if start_ray else []),
        ("disk", partial(_check_disk, store)),
        ("store", partial(_check_store, store)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:
            yield Check(name, "problem", describe(error), "" if isinstance(error, MorayError) else _UNEXPECTED)


def describe(error: BaseException) -> str:
    """An error in one line. Ours say what to do; others need their type to be understood."""
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, MorayError | ChildError) else f"{type(error).__name__}: {text}"


# ---------------------------------------------------------------------------------- installation


def _check_python() -> Iterator[Check]:
    version, system = platform.python_version(), platform.system()
    found = f"{version} on {system} {platform.machine()}"
    if system != "Linux":
        yield Check("python", "problem", found, "moray needs Linux (memfd and abstract sockets)")
    elif tuple(int(part) for part in version.split(".")[:2]) < MIN_PYTHON:
        wanted = ".".join(str(part) for part in MIN_PYTHON)
        yield Check("python", "problem", found, f"install Python {wanted} or newer and moray in it")
    else:
        yield Check("python", "ok", found)


def _check_packages() -> Iterator[Check]:
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


# ------------------------------------------------------------------------------- CPU and kernels


def _check_cpu() -> Iterator[Check]:
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    found = f"{_cpu_model()}, {cores} of {os.cpu_count()} cores for this process"
    if quota is None or quota >= cores:
        yield Check("cpu", "ok", found)
        return
    found += f", but its control group has the time of {quota:g}"
    remedy = f"give `--threads {max(1, int(quota))}`: with more, threads wait for each other's turn"
    yield Check("cpu", "warning", found, remedy)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The cores' worth of time that this process's control groups (both versions) allow it; None: no limit."""
    quotas: list[float] = []
    for line in groups.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers
        own = base / group.strip("/")
        # A container sees its own group at the root, not at the path that the host knows.
        folders = [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
        quotas += [quota for folder in folders if (quota := _read_quota(folder)) is not None]
    return min(quotas, default=None)


def _read_quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return None
    return int(quota) / int(period) if quota.isdigit() else None  # "max" and -1: none


def _check_instruction_set() -> Iterator[Check]:
    try:
        from moray.runtime.kernels.isa import INSTRUCTION_SETS, detect_instruction_set

        chosen = detect_instruction_set()
    except ValueError as error:
        yield Check("instruction set", "problem", str(error), "unset MORAY_KERNEL, or set it to one of these")
        return
    if not os.environ.get("MORAY_KERNEL"):
        yield Check("instruction set", "ok", f"{chosen}, the best this CPU has")
        return
    best = _without_variable("MORAY_KERNEL", detect_instruction_set)
    yield judge_override(chosen, best, INSTRUCTION_SETS)


def judge_override(chosen: str, best: str, from_best_to_worst: tuple[str, ...]) -> Check:
    found = f"{chosen}, set by MORAY_KERNEL; the best this CPU has is {best}"
    if chosen == best:
        return Check("instruction set", "ok", found)
    if from_best_to_worst.index(chosen) > from_best_to_worst.index(best):
        return Check("instruction set", "warning", found, "unset MORAY_KERNEL: it makes kernels slower, not better")
    return Check("instruction set", "problem", found, "unset MORAY_KERNEL: this CPU cannot run such kernels")


def _without_variable(name: str, function: Callable[[], str]) -> str:
    value = os.environ.pop(name)
    try:
        return function()
    finally:
        os.environ[name] = value


def _check_kernels() -> Iterator[Check]:
    try:
        found = ask_child("try_kernels")
    except ChildError as error:
        remedy = "unset MORAY_KERNEL if it is set; else set it to portable, which every CPU runs, and report this"
        yield Check("kernels", "problem", describe(error), remedy)
        return
    took = f"{found['instruction_set']}, {found['seconds']:.1f} s"
    if found["equal"]:
        yield Check("kernels", "ok", f"int8 results equal the reference bit for bit ({took})")
    else:
        remedy = "set MORAY_KERNEL=portable and report this: tokens would differ from those of other machines"
        yield Check("kernels", "problem", f"int8 results differ from the reference ({took})", remedy)
    yield judge_threading_layer(found["layer"], found["threads"])


def judge_threading_layer(layer: str, threads: int) -> Check:
    found = f"{layer}, {threads} threads"
    if layer == "omp":
        return Check("threading layer", "ok", found)
    why = "aborts when two threads compute at once" if layer == "workqueue" else "competes with torch's threads"
    remedy = f"{layer} {why}; install torch from PyPI or download.pytorch.org, whose OpenMP library Numba then shares"
    return Check("threading layer", "warning", found, remedy)


def try_kernels() -> dict[str, Any]:
    """Compare the compiled int8 kernel with its definition. Runs in a child: a wrong instruction ends it."""
    import numba
    import numpy as np

    from moray.runtime.kernels import isa, ops, reference
    from moray.runtime.layout.packed import PackedSpec, Quantized, pack_quantized

    started = perf_counter()
    random = np.random.default_rng(0)
    spec = PackedSpec(40, 256, "q4", 64)  # 40 rows: the last block of 16 is not full
    codes = random.integers(0, 16, (40, 256), dtype=np.uint8)
    scales, zeros = random.uniform(0.01, 0.1, (40, 4)), random.uniform(0, 15, (40, 4))
    packed = pack_quantized(Quantized(codes, scales.astype(np.float32), zeros.astype(np.float32)), spec)
    x_TC = random.standard_normal((5, 256), dtype=np.float32)
    y_TR = ops.linear(x_TC, packed, ops.MatrixKernel.of(spec, "int8"))
    return {
        "equal": y_TR.tobytes() == reference.matmul(x_TC, packed, spec).tobytes(),
        "instruction_set": isa.INSTRUCTION_SET,
        "layer": numba.threading_layer(),
        "threads": numba.get_num_threads(),
        "seconds": perf_counter() - started,
    }


# ------------------------------------------------------------------------------- memory and GPU


def _check_memory() -> Iterator[Check]:
    import psutil

    from moray.runtime.memory import available_memory, format_bytes

    total, available = psutil.virtual_memory().total, available_memory()
    found = f"{format_bytes(available)} available of {format_bytes(total)}"
    if available < ENGINE_BYTES:
        needed = f"an engine needs {format_bytes(ENGINE_BYTES)} besides its model"
        yield Check("memory", "warning", found, f"{needed}; close other programs")
    else:
        yield Check("memory", "ok", found)


def _check_arena() -> Iterator[Check]:
    from moray.runtime.arena import Arena

    arena = Arena.create(1, 1 << 20)
    try:
        Arena.attach(arena.ref).close()  # as another process of this user would
    finally:
        arena.close()
    yield Check("arena", "ok", "shared memory (memfd) can be made, and mapped again through /proc")


def _check_gpu() -> Iterator[Check]:
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

    from moray.runtime.memory import format_bytes

    name = torch.cuda.get_device_name(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
        torch.ones(16, device=f"cuda:{index}").sum().item()
    except RuntimeError as error:
        remedy = "install the torch build that fits this GPU and its driver (pytorch.org), or use `--device cpu`"
        return Check("gpu", "problem", f"{name} does not compute: {describe(error)}", remedy)
    return Check("gpu", "ok", f"{name}, {format_bytes(free)} free of {format_bytes(total)}")


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


# ------------------------------------------------------------------------------------------ Ray


def _check_ray() -> Iterator[Check]:
    yield Check("ray", "ok", metadata.version("ray"))
    yield judge_ray_token(os.environ, Path.home() / ".ray" / "auth_token")


def judge_ray_token(environ: Mapping[str, str], token_file: Path) -> Check:
    """What Ray will do about authentication. An engine's own session always has a fresh token; clusters may not."""
    name, mode = "ray authentication", environ.get("RAY_AUTH_MODE", "")
    if mode and mode.lower() != "token":
        found = f"RAY_AUTH_MODE={mode}: Ray asks for no token, so whoever reaches its ports can run code as you"
        return Check(name, "warning", found, "unset RAY_AUTH_MODE, or set it to token on every machine")
    if environ.get("RAY_AUTH_TOKEN"):
        return Check(name, "ok", "token, from RAY_AUTH_TOKEN")
    if path := environ.get("RAY_AUTH_TOKEN_PATH"):
        if Path(path).is_file():
            return Check(name, "ok", f"token, from {path}")
        found = f"RAY_AUTH_TOKEN_PATH={path} is not a file"
        return Check(name, "warning", found, "unset it, or copy the cluster's token there, before joining a cluster")
    if not token_file.is_file():
        return Check(name, "ok", "a fresh token for each local engine; none stored for clusters")
    found = f"a fresh token for each local engine; {token_file} for clusters"
    if mode:
        return Check(name, "ok", found)
    # With this file `ray start --head` asks for the token, but `ray start --address` does not send it.
    remedy = "for a cluster, set RAY_AUTH_MODE=token on every machine and copy the head's token file to all of them"
    return Check(name, "ok", found, remedy)


def _check_ray_session() -> Iterator[Check]:
    try:
        found = ask_child("try_ray")
    except ChildError as error:
        remedy = "the reason is in /tmp/ray/session_latest/logs, or where RAY_TMPDIR says; see also the checks above"
        yield Check("ray session", "problem", f"a local session does not work: {describe(error)}", remedy)
        return
    yield judge_ray_session(found, _count_torch_gpus())


def judge_ray_session(found: Mapping[str, Any], num_torch_gpus: int) -> Check:
    text = (
        f"started in {found['start_s']:.1f} s, a worker answered in {found['answer_s']:.1f} s, "
        f"stopped in {found['stop_s']:.1f} s; GPUs: {found['num_gpus']}"
    )
    if num_torch_gpus and not found["num_gpus"]:
        remedy = "engines would not use the GPU that torch sees: check that `nvidia-smi` works, as Ray asks its library"
        return Check("ray session", "warning", text, remedy)
    return Check("ray session", "ok", text)


def try_ray() -> dict[str, Any]:
    """Start Ray here, have a worker import moray and answer, stop it. Runs in a child: Ray may end its process."""
    import ray

    from moray.cluster import ray_session
    from moray.runtime.errors import ClusterError

    begin = perf_counter()
    try:
        session = ray_session.start_local(1)
    except ClusterError as error:
        raise error.__cause__ or error from None  # its advice is to run us
    started = perf_counter()
    try:
        ray.get(ray.remote(_answer_ray).remote(), timeout=RAY_ANSWER_TIMEOUT_S)
        answered = perf_counter()
    finally:
        ray_session.leave(session)
    return {
        "start_s": started - begin,
        "answer_s": answered - started,
        "stop_s": perf_counter() - answered,
        "num_gpus": session.num_gpus,
    }


def _answer_ray() -> int:
    return os.getpid()


def _count_torch_gpus() -> int:
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


# ------------------------------------------------------------------------------- disk and store


def _check_disk(store: Path | None) -> Iterator[Check]:
    from moray.runtime.memory import format_bytes

    wanted = (store or Path()).absolute()
    folder = next(path for path in (wanted, *wanted.parents) if path.is_dir())
    usage = shutil.disk_usage(folder)
    found = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)} at {folder}"
    if usage.free < MIN_FREE_DISK_BYTES:
        yield Check("disk", "warning", found, "make room: a conversion needs the size of its store, Ray some for logs")
    else:
        yield Check("disk", "ok", found)


def _check_store(path: Path | None) -> Iterator[Check]:
    from moray.deploy.config import demo_store
    from moray.runtime.memory import available_memory, format_bytes
    from moray.runtime.store.store import Store

    name = "demonstration store" if path is None else str(path)
    try:
        with Store.open(path or demo_store()) as store:
            manifest = store.manifest
    except StoreError as error:
        remedy = "reinstall moray: its demonstration store is part of it" if path is None else ""
        yield Check("store", "problem", describe(error), remedy)
        return
    experts = len(manifest.shards) * manifest.slot_bytes  # as they lie in an arena
    sizes = f"{name}: experts {format_bytes(experts)}, trunk {format_bytes(manifest.trunk_bytes)}"
    yield judge_store_memory(sizes, experts + manifest.trunk_bytes, available_memory())


def judge_store_memory(sizes: str, needed: int, free: int) -> Check:
    from moray.runtime.memory import format_bytes

    found = f"{sizes}; {format_bytes(needed)} needed, {format_bytes(free)} of memory free"
    smaller = "close other programs, convert with a smaller recipe (--recipe), or use a machine with more memory"
    if needed > free:
        return Check("store", "problem", found, smaller)
    if needed + ENGINE_BYTES > free:
        return Check("store", "warning", f"{found}, and an engine takes {format_bytes(ENGINE_BYTES)} more", smaller)
    return Check("store", "ok", found)


# ------------------------------------------------------------------------------- child processes


def ask_child(function: str) -> dict[str, Any]:
    """Run a function of this module in a process of its own. Raises ChildError, whatever becomes of that."""
    program = f"from moray.deploy import doctor; doctor.answer_parent('{function}')"
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ChildError(f"no answer after {CHILD_TIMEOUT_S:.0f} s") from None
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        raise ChildError(_explain_death(child.returncode, child.stderr))
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise ChildError(answer["error"])
    return answer


def answer_parent(function: str) -> None:
    """What the child runs: one line of JSON on standard output."""
    try:
        answer = globals()[function]()
    except Exception as error:
        answer = {"error": describe(error)}
    print(json.dumps(answer), flush=True)


def _explain_death(returncode: int, stderr: str) -> str:
    ended = signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return f"the process that tried ended with {ended}" + (f": {lines[-1][:300]}" if lines else "")

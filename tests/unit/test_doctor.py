from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moray.deploy import config, doctor
from moray.deploy.doctor import Check, kernels, machine, ray_checks
from moray.deploy.doctor.child import ChildError, ask_child
from moray.deploy.doctor.store import check_store
from moray.runtime import cpu, memory
from moray.runtime.errors import ResourceError

KERNELS = {"equal": True, "instruction_set": "avx2", "threads": 4, "seconds": 0.5}
RAY = {"start_s": 3.0, "answer_s": 0.7, "stop_s": 1.4, "num_gpus": 0}


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the child process answers, or the error it ends with."""

    def set_answer(found: dict[str, Any] | ChildError) -> None:
        def answer(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            if isinstance(found, ChildError):
                raise found
            return found

        for module in (kernels, ray_checks):
            monkeypatch.setattr(module, "ask_child", answer)

    return set_answer


def only(checks: Iterable[Check]) -> Check:
    (check,) = checks
    return check


# ----------------------------------------------------------------------------------------- all


def test_the_machine_that_runs_the_tests_computes_what_the_reference_says(store: Callable[..., Path]) -> None:
    found = list(doctor.run_checks(store("mixtral"), start_ray=False))
    assert [check.name for check in found] == [
        *("python", "packages", "cpu", "instruction set", "kernels", "memory", "arena"),
        *("gpu", "ray", "ray authentication", "disk", "store"),
    ]
    checks = {check.name: check for check in found}
    for name in ("python", "packages", "kernels", "arena", "ray"):
        assert checks[name].status == "ok", checks[name]
    assert checks["store"].status != "problem" and str(store("mixtral")) in checks["store"].found


def test_an_error_inside_a_check_is_a_problem_and_the_next_checks_still_run(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[..., None]
) -> None:
    def fail(*args: object) -> None:
        raise PermissionError(13, "no such luck")

    def refuse() -> None:
        raise ResourceError("needs 2 GiB, 1 GiB is free; buy more")

    answer(KERNELS)
    for name in ("packages", "cpu", "gpu", "disk"):
        monkeypatch.setattr(machine, f"check_{name}", fail)
    monkeypatch.setattr(machine, "check_memory", refuse)
    monkeypatch.setattr(ray_checks, "check_ray", fail)
    monkeypatch.setattr(doctor, "check_store", fail)
    checks = {check.name: check for check in doctor.run_checks(start_ray=False)}
    assert checks["cpu"].status == checks["store"].status == "problem"
    assert checks["cpu"].found == "PermissionError: [Errno 13] no such luck" and checks["cpu"].remedy
    assert checks["memory"] == Check("memory", "problem", "needs 2 GiB, 1 GiB is free; buy more")
    assert checks["kernels"].status == checks["arena"].status == "ok"


def test_ray_is_started_only_when_asked(answer: Callable[..., None]) -> None:
    answer(KERNELS | RAY)
    assert "ray session" in [check.name for check in doctor.run_checks()]
    assert "ray session" not in [check.name for check in doctor.run_checks(start_ray=False)]


# -------------------------------------------------------------------------------- installation


@pytest.mark.parametrize(
    ("version", "system", "status"),
    [
        ("3.11.0", "Linux", "ok"),
        ("3.14.0rc1", "Linux", "ok"),
        ("3.9.20", "Linux", "problem"),
        ("3.12.1", "Darwin", "problem"),
    ],
)
def test_python_and_system(monkeypatch: pytest.MonkeyPatch, version: str, system: str, status: str) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: version)
    monkeypatch.setattr(platform, "system", lambda: system)
    check = only(machine.check_python())
    assert check.status == status and version in check.found and bool(check.remedy) == (status == "problem")


def test_packages_outside_their_range_and_missing_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["alpha<3,>=2", "beta[more]~=1.4.0", "gamma>=1", "delta>=1", 'extra>=9; extra == "dev"']
    wanted += ['elsewhere>=1; sys_platform == "win32"']
    installed = {"alpha": "2.5", "beta": "1.4.7+cpu", "gamma": "0.9", "extra": "1"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(metadata, "version", version)
    assert list(machine.check_packages()) == [
        Check("packages", "problem", "gamma 0.9, expected >=1", "pip install 'gamma>=1'"),
        Check("packages", "problem", "delta is not installed", "pip install 'delta>=1'"),
        Check("packages", "ok", "alpha 2.5, beta 1.4.7+cpu"),
    ]


def test_moray_on_the_path_but_not_installed_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    check = only(machine.check_packages())
    assert check.status == "problem" and "pip install -e" in check.remedy


# ----------------------------------------------------------------------------- CPU and kernels


def test_a_quota_below_the_cores_is_a_warning_with_the_threads_of_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cpu, "cpu_quota", lambda: 2.5)
    check = only(machine.check_cpu())
    assert check.status == "warning" and "the time of 2.5: engines take 2 threads" in check.found and check.remedy
    monkeypatch.setattr(cpu, "cpu_quota", lambda: 8.0)
    assert only(machine.check_cpu()).status == "ok"


def test_an_instruction_set_override_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MORAY_KERNEL", raising=False)
    best = only(kernels.check_instruction_set())
    assert best.status == "ok" and "best" in best.found
    monkeypatch.setenv("MORAY_KERNEL", "portable")
    assert "set by MORAY_KERNEL" in only(kernels.check_instruction_set()).found
    assert os.environ["MORAY_KERNEL"] == "portable"
    monkeypatch.setenv("MORAY_KERNEL", "mmx")
    unknown = only(kernels.check_instruction_set())
    assert unknown.status == "problem" and "mmx" in unknown.found and unknown.remedy


@pytest.mark.parametrize(
    ("chosen", "best", "status"),
    [("fast", "fast", "ok"), ("plain", "fast", "warning"), ("fast", "plain", "problem")],
)
def test_overrides_slower_and_faster_than_the_cpu(chosen: str, best: str, status: str) -> None:
    assert kernels.judge_override(chosen, best, ("fast", "plain")).status == status


def test_kernels_that_differ_from_the_reference_are_a_problem(answer: Callable[..., None]) -> None:
    answer(KERNELS | {"equal": False})
    result = only(kernels.check_kernels())
    assert result.status == "problem" and "differ" in result.found and result.remedy


def test_kernels_that_end_their_process_are_a_problem(answer: Callable[..., None]) -> None:
    answer(ChildError("the process that tried ended with SIGILL"))
    check = only(kernels.check_kernels())
    assert check.status == "problem" and "SIGILL" in check.found and "MORAY_KERNEL" in check.remedy


# ----------------------------------------------------------------------------- memory and GPU


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 300 << 20)
    check = only(machine.check_memory())
    assert check.status == "warning" and check.found.startswith("300.0 MiB available of")


def test_an_arena_that_does_not_fit_is_a_problem(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., None]) -> None:
    answer(KERNELS)
    monkeypatch.setattr(memory, "available_memory", lambda: 4096)
    checks = {check.name: check for check in doctor.run_checks(start_ray=False)}
    assert checks["arena"].status == "problem" and "1.0 MiB" in checks["arena"].found


def test_no_gpu_is_fine_unless_there_is_a_driver() -> None:
    assert machine.judge_no_gpu(False, None, []).status == "ok"
    cpu_build = machine.judge_no_gpu(True, None, [])
    assert cpu_build.status == "warning" and "CUDA build" in cpu_build.remedy
    old_driver = machine.judge_no_gpu(True, "13.0", ["the driver is too old"])
    assert "too old" in old_driver.found and "CUDA 13.0" in old_driver.remedy


def test_a_gpu_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def no_kernel(*args: object, **options: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (6 << 30, 8 << 30))
    reason: str | None = None
    monkeypatch.setattr("moray.runtime.device.kernels.why_not", lambda device: reason)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", lambda *size, device: torch.zeros(*size))
        fine = only(machine.check_gpu())
        reason = "RuntimeError: Failed to find C compiler"
        slow = only(machine.check_gpu())
        patch.setattr(torch, "ones", no_kernel)
        broken = only(machine.check_gpu())
    found = "Some GPU, 6.0 GiB free of 8.0 GiB; Triton kernels compile and compute right"
    assert fine == Check("gpu", "ok", found)
    assert slow.status == "warning" and "C compiler" in slow.found and "gcc" in slow.remedy
    assert broken.status == "problem" and "no kernel image" in broken.found and broken.remedy


# ----------------------------------------------------------------------------------------- Ray


@pytest.mark.parametrize(
    ("environ", "stored", "status", "found", "has_remedy"),
    [
        ({}, False, "ok", "none stored", False),
        ({}, True, "ok", "auth_token for clusters", True),
        ({"RAY_AUTH_MODE": "TOKEN"}, True, "ok", "auth_token for clusters", False),
        ({"RAY_AUTH_MODE": "disabled"}, True, "warning", "RAY_AUTH_MODE=disabled", True),
        ({"RAY_AUTH_MODE": "tokne"}, False, "warning", "RAY_AUTH_MODE=tokne", True),
        ({"RAY_AUTH_TOKEN": "secret"}, True, "ok", "from RAY_AUTH_TOKEN", False),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, True, "warning", "/nowhere/token is not a file", True),
        ({"RAY_AUTH_TOKEN_PATH": __file__}, False, "ok", __file__, False),
    ],
)
def test_where_rays_token_comes_from(
    tmp_path: Path, environ: dict[str, str], stored: bool, status: str, found: str, has_remedy: bool
) -> None:
    file = tmp_path / "auth_token"
    if stored:
        file.write_text("0123456789")
    check = ray_checks.judge_ray_token(environ, file)
    assert (check.status, bool(check.remedy)) == (status, has_remedy) and found in check.found
    assert "secret" not in check.found and "0123456789" not in check.found


def test_a_ray_session_that_does_not_start_is_a_problem(answer: Callable[..., None]) -> None:
    answer(ChildError("no answer after 300 s"))
    check = only(ray_checks.check_ray_session())
    assert check.status == "problem" and "no answer after 300 s" in check.found and check.remedy


def test_a_gpu_that_ray_does_not_see_is_a_warning() -> None:
    assert ray_checks.judge_ray_session(RAY, 0).status == "ok"
    assert ray_checks.judge_ray_session(RAY | {"num_gpus": 1}, 1).status == "ok"
    check = ray_checks.judge_ray_session(RAY, 1)
    assert check.status == "warning" and "started in 3.0 s" in check.found and check.remedy


# ------------------------------------------------------------------------------ disk and store


def test_disk_space_is_that_of_the_nearest_folder_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = SimpleNamespace(total=100 << 30, free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check = only(machine.check_disk(tmp_path / "not" / "yet"))
    assert check == Check("disk", "warning", f"1.0 MiB free of 100.0 GiB at {tmp_path}", check.remedy)


def test_a_store_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = only(check_store(tmp_path / "missing"))
    assert check.status == "problem" and "missing is not a directory" in check.found
    monkeypatch.setattr(config, "demo_store", lambda: tmp_path)
    embedded = only(check_store(None))
    assert embedded.status == "problem" and "reinstall" in embedded.remedy


def test_a_store_bigger_than_memory_is_a_problem_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch, store: Callable[..., Path]
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 9 << 10)
    check = only(check_store(store("mixtral")))
    assert check.status == "problem" and "9.0 KiB of memory are free" in check.found and check.remedy
    monkeypatch.setattr(memory, "available_memory", lambda: 2 << 30)
    check = only(check_store(store("mixtral")))
    assert check.status == "ok" and "all experts" in check.found and "512 tokens" in check.found


# ------------------------------------------------------------------------------ child processes


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Replaces the interpreter of child processes by a shell script."""

    def use(script: str) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(program))

    return use


def test_an_error_in_a_child_is_told_in_one_line() -> None:
    with pytest.raises(ChildError, match=r"^TypeError: loads\(\) missing 1 required"):
        ask_child(json.loads)


def test_noise_before_a_childs_answer_is_ignored(child: Callable[[str], None]) -> None:
    child("""echo '{"noise"'; echo '{"threads": 4}'""")
    assert ask_child(kernels.try_kernels) == {"threads": 4}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo first >&2; echo LLVM ERROR >&2; kill -ABRT $$", "ended with SIGABRT: LLVM ERROR$"),
        ("exit 3", "ended with exit code 3$"),
        ("exit 0", "ended with exit code 0$"),
    ],
)
def test_a_child_that_dies_is_a_child_error(child: Callable[[str], None], script: str, message: str) -> None:
    child(script)
    with pytest.raises(ChildError, match=message):
        ask_child(kernels.try_kernels)


def test_a_child_that_hangs_is_ended(child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    child("exec sleep 60")
    monkeypatch.setattr("moray.deploy.doctor.child.TIMEOUT_S", 0.2)
    with pytest.raises(ChildError, match="no answer after 0 s"):
        ask_child(kernels.try_kernels)

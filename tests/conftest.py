"""Fixtures for all tests. ``tests`` itself is importable: ``from helpers.checkpoints import tiny_checkpoint``."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No test says anything about time: machines are shared.
settings.register_profile("moray", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moray")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads: those that spin take cores from other processes
if not Path("/proc/driver/nvidia/version").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # else Triton, if there is one, looks for a GPU; read when it is imported
os.environ.pop("COLUMNS", None)  # readline gives it to child processes, and rich keeps what it finds first
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="moray-tests-")  # engines of tests keep their traffic there
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What one process runs if several run the tests: a file; of the tests that start Ray, all, one after the other."""
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint(family)``: a tiny float32 checkpoint, written once a session. Do not change its files."""
    from helpers.checkpoints import tiny_checkpoint

    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tiny_checkpoint(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


@pytest.fixture(scope="session")
def store(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``store(family, recipe)``: that checkpoint converted, once a session. Do not change its files."""
    from moray.runtime.convert.converter import convert

    made: dict[tuple[str, str | None], Path] = {}

    def of(family: str, recipe: str | None = None) -> Path:
        if (family, recipe) not in made:
            path = tmp_path_factory.mktemp("stores") / family
            convert(checkpoint(family), path, recipe)
            made[family, recipe] = path
        return made[family, recipe]

    return of

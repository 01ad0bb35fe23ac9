"""``moray doctor``: what is wrong with this machine, and what to do about it.

Each check imports what it needs itself, so that a broken installation is a finding and not a crash. The two that can
end the process outright (compiled kernels, Ray) run in a child process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from moray.deploy.doctor import kernels, machine, ray_checks
from moray.deploy.doctor.check import Check, describe
from moray.deploy.doctor.store import check_store
from moray.runtime.errors import MorayError

__all__ = ["Check", "run_checks"]


def run_checks(store: Path | None = None, *, start_ray: bool = True) -> Iterator[Check]:
    """Check this machine for a store (None: the embedded demonstration model), yielding each finding as it is made.

    Never raises: a check that fails is a problem. ``start_ray`` starts a local Ray session, which takes seconds.
    """
    checks: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("python", machine.check_python),
        ("packages", machine.check_packages),
        ("cpu", machine.check_cpu),
        ("instruction set", kernels.check_instruction_set),
        ("kernels", kernels.check_kernels),
        ("memory", machine.check_memory),
        ("arena", machine.check_arena),
        ("gpu", machine.check_gpu),
        ("ray", ray_checks.check_ray),
        *([("ray session", ray_checks.check_ray_session)] if start_ray else []),
        ("disk", partial(machine.check_disk, store)),
        ("store", partial(check_store, store)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:
            unexpected = "if this does not say enough, report it with the output of `moray doctor --json`"
            yield Check(name, "problem", describe(error), "" if isinstance(error, MorayError) else unexpected)

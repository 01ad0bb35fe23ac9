"""Check of a store, and of the memory it needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moray.deploy.doctor.check import Check, describe
from moray.runtime.errors import MorayError, ResourceError, StoreError

_REMEDY = "close other programs, convert with a smaller recipe (--recipe), or use a machine with more memory"


def check_store(path: Path | None) -> Iterator[Check]:
    from moray.deploy.config import demo_store, make_config
    from moray.deploy.memory_plan import plan_engine, plan_rows

    name = "demonstration store" if path is None else str(path)
    try:
        plan = plan_engine(path or demo_store(), make_config({}))
    except StoreError as error:
        remedy = "reinstall moray: its demonstration store is part of it" if path is None else ""
        yield Check("store", "problem", describe(error), remedy)
        return
    except MorayError as error:
        yield Check("store", "problem", describe(error), _REMEDY if isinstance(error, ResourceError) else "")
        return
    rows = "; ".join(f"{what} {line}" for what, line in plan_rows(plan).items())
    yield Check("store", "ok", f"{name}: {rows}")

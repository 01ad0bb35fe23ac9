"""The actor that keeps an engine while servers come and go."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from time import monotonic
from typing import Any

import ray

from moray.actors.guard import Owner, exit_with
from moray.actors.ledger import LedgerClient
from moray.actors.messages import EngineStats
from moray.actors.streams import await_compute
from moray.deploy.config import EngineConfig
from moray.deploy.engine import Engine
from moray.runtime.errors import MorayError

KEEPER = "moray-engine-keeper"


@dataclass(frozen=True, slots=True)
class EngineAccess:
    """A running engine, for servers."""

    compute: Any  # handle of its compute actor
    ledger: LedgerClient  # where its events are noted
    context_length: int
    fingerprint: str  # of the store and the class of numerics


class EngineKeeper:
    """Owns one engine, which ends with this process.

    Servers say that they live; some time after the last one has fallen silent the engine is ended. Without an owner,
    the cluster is somebody else's, and the engine joins it: nodes may come and go.
    """

    def __init__(self, linger_s: float, owner: Owner | None) -> None:
        exit_with(owner, end_ray=True)
        self._linger_s = linger_s
        self._address = None if owner is not None else ray.get_runtime_context().gcs_address
        self._changing = threading.RLock()
        self._engine: Engine | None = None
        self._heard_s = monotonic()
        threading.Thread(target=self._watch, name="moray-keeper", daemon=True).start()

    def ensure(self, config: EngineConfig, linger_s: float) -> EngineAccess:
        """An engine of this configuration: the one that runs, or a new one in its place. Raises MorayError."""
        config = config.model_copy(update={"address": self._address})
        with self._changing:
            self._linger_s = linger_s
            if self._engine is not None and not (self._engine.config == config and _is_alive(self._engine)):
                self.stop()
            if self._engine is None:
                self._engine = Engine(config)
            self._heard_s = monotonic()
            return _access(self._engine)

    def touch(self) -> None:
        """A server lives."""
        self._heard_s = monotonic()

    def stats(self) -> EngineStats | None:
        """Of the engine, if there is one. Raises MorayError."""
        engine = self._engine
        return None if engine is None else engine.stats()

    def stop(self) -> None:
        """End the engine now."""
        with self._changing:
            self._engine, old = None, self._engine
            if old is not None:
                old.close()

    def _watch(self) -> None:
        while True:
            threading.Event().wait(min(1.0, self._linger_s))
            with self._changing:  # an engine that is being started is wanted
                if monotonic() - self._heard_s > self._linger_s:
                    self.stop()
                    os._exit(0)


def _access(engine: Engine) -> EngineAccess:
    report = engine.actors.compute_report
    fingerprint = f"{engine.fingerprint[:12]}-{report.numerics}"
    return EngineAccess(engine.actors.compute, engine.actors.ledger, report.context_length, fingerprint)


def _is_alive(engine: Engine) -> bool:
    """Whether it serves, if need be after its compute actor was brought back."""
    try:
        await_compute(engine.actors.compute)
    except MorayError:
        return False
    return True

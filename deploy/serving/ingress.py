"""The Ray Serve deployment: one server in front of the engine."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve

from moray.cluster.nodes import ROLE_LABEL
from moray.deploy.serving.api import make_api
from moray.deploy.serving.args import ServeArgs
from moray.deploy.serving.engine_client import EngineClient
from moray.deploy.serving.keys import KeyFile
from moray.deploy.serving.metrics import Metrics, poll
from moray.deploy.serving.observer import Observer, open_log
from moray.deploy.serving.service import Service

# Serve would let requests wait or answer them 503 by itself; the server says 429 and when to come back.
_MAX_ONGOING = 4096
# Where the engine will be if a node is labelled for it; else the engine comes to where the server is.
_ANYWHERE: list[dict[str, Any]] = [{"label_selector": {}}]


@serve.ingress()
class Server:
    """Finds or starts the engine, then answers. Holds no state that a successor would miss."""

    async def __init__(self, args: ServeArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        self._args = args
        self._keys = None if args.api_keys is None else KeyFile(args.api_keys)
        self._log = open_log(args.request_log)
        self._service = Service(args, await EngineClient.connect(args.engine, args.linger_s))
        self._metrics = Metrics()
        self._polling = asyncio.create_task(poll(self._metrics, self._service.engine.stats))

    def __serve_build_asgi_app__(self) -> Any:
        api = make_api(self._service, self._keys)
        api.add_middleware(Observer, metrics=self._metrics, log=self._log)
        return api

    async def check_health(self) -> None:
        """Serve starts another server if this fails repeatedly; it starts another engine if that is gone."""
        await self._service.engine.ping()


def make_application(args: ServeArgs) -> serve.Application:
    """One replica: there is one engine, and it batches."""
    deployment: Any = serve.deployment(
        Server,
        name="openai",
        num_replicas=1,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": 0, "label_selector": {ROLE_LABEL: "compute"}, "fallback_strategy": _ANYWHERE},
        graceful_shutdown_timeout_s=args.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
    )
    application: serve.Application = deployment.bind(args)
    return application

"""The command line's flags of an engine, the same for every command that starts one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:  # pydantic takes a while, and --help does without
    from moray.deploy.config import EngineConfig

HostsOption = Annotated[int | None, typer.Option(help="Expert hosts here; by default one for each NUMA node.")]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads that compute; none: every core this process may use.")]

_OPTIONS: dict[str, Any] = {
    "hosts": HostsOption,
    "device": Annotated[str | None, typer.Option(help="auto, cpu or cuda.")],
    "numerics": Annotated[str | None, typer.Option(help="auto, int8 or float (docs/format.md).")],
    "address": Annotated[str | None, typer.Option(help="HOST:PORT of a running Ray cluster; none: start Ray here.")],
    "threads": ThreadsOption,
    "host_memory": Annotated[
        str | None,
        typer.Option(help="Memory for experts, e.g. 8GiB, or 80% of what is available; none: as much as is left."),
    ],
    "device_memory": Annotated[
        str | None, typer.Option(help="Memory to use of the GPU, a size or a share of what is free; none: 90%.")
    ],
    "context": Annotated[
        int | None, typer.Option(help="Most tokens of one sequence; none: as many as fit, at most the model's limit.")
    ],
    "policy": Annotated[
        str | None,
        typer.Option(help="What is evicted if not all experts fit: lfu, layer-lru, lru; auto: by recorded traffic."),
    ],
    "prefetch": Annotated[
        str | None, typer.Option(help="Load experts ahead of need: on, off; auto: as long as it pays.")
    ],
    "lanes": Annotated[
        str | None,
        typer.Option(help="Where experts are computed: device-copy, host-cpu; local, remote (nodes); auto: by rates."),
    ],
    "replication": Annotated[
        float | None,
        typer.Option(help="Share of bandwidth for copying hot experts of other nodes here; none: 0.25; 0: never."),
    ],
    "max_running": Annotated[int | None, typer.Option(help="Most sequences that run at once; none: 32.")],
    "speculation": Annotated[
        str | None,
        typer.Option(help="Compute tokens ahead that followed the same ones before: auto, where it pays; off."),
    ],
    "config": Annotated[Path | None, typer.Option(help="YAML file with the same names; flags win over it.")],
}


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """What was given."""

    values: dict[str, Any]
    config: Path | None

    def settings(self, store: Path | None, **more: Any) -> EngineConfig:
        """Raises ConfigError."""
        from moray.deploy.config import make_config

        return make_config(self.values | {"store": store} | more, self.config)


def takes_engine(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an engine's flags, but for ``without``; they come as its argument ``engine: EngineFlags``."""
    names = [name for name in _OPTIONS if name not in without]

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(**given: Any) -> None:
            values = {name: given.pop(name) for name in names}
            function(**given, engine=EngineFlags(values, values.pop("config")))

        hints = get_type_hints(function, include_extras=True)
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "engine"]
        kind = inspect.Parameter.KEYWORD_ONLY
        flags = [inspect.Parameter(name, kind, default=None) for name in names]
        annotations = {p.name: hints[p.name] for p in own} | {name: _OPTIONS[name] for name in names}
        parameters = [p.replace(kind=kind, annotation=annotations[p.name]) for p in (*own, *flags)]
        run.__annotations__ = annotations
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return add

"""Arguments of the Ray Serve application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from moray.actors.wiring import MAX_STREAMS
from moray.deploy.config import EngineConfig, load_config
from moray.runtime.planning.sizes import parse_bytes

_SPARE_STREAMS = 8  # of the compute actor, for other users of the engine


class ServeArgs(EngineConfig):
    """An engine's configuration, and what the server in front of it allows.

    Where it listens is Ray Serve's: ``http_options`` in a deployment's YAML, ``--host`` and ``--port`` of ``moray
    serve``. ``address`` stays None: the engine runs in the cluster that the application is deployed to, whose nodes
    ``nodes`` may name. Relative paths count from where the arguments are read.
    """

    address: None = None
    #: The model's name in requests and answers; none: the store's directory.
    model_name: str | None = Field(None, min_length=1, pattern=r"^[\w./:@+-]+$")
    #: File of API keys (moray api-keys). None: only callers on the same machine are answered.
    api_keys: Path | None = None
    #: Most choices generated or waiting at a time; a request that would exceed it is answered 429.
    max_requests: int = Field(48, ge=1, le=MAX_STREAMS - _SPARE_STREAMS)
    #: File on the server's node to which a line of JSON is appended for each request; none: standard error.
    request_log: Path | None = None
    #: Largest body of a request.
    max_body: str = "4MiB"
    #: Seconds after which a request is ended, with an error.
    request_timeout_s: float = Field(3600.0, gt=0, le=7 * 86400, allow_inf_nan=False)
    #: Seconds that running requests get to end when the server is replaced or stopped.
    drain_s: float = Field(120.0, ge=0, le=86400, allow_inf_nan=False)
    #: Seconds that the engine outlives its last server: a new version of the server finds it as it was.
    linger_s: float = Field(60.0, ge=1, le=86400, allow_inf_nan=False)

    @model_validator(mode="after")
    def _has_cluster(self) -> ServeArgs:  # in place of an engine's own check: it has the cluster that it is deployed to
        return self

    @field_validator("store", "api_keys", "request_log", "trace")
    @classmethod
    def _is_absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    @field_validator("max_body")
    @classmethod
    def _is_body_size(cls, text: str) -> str:
        parse_bytes(text, option="max_body")
        return text

    @property
    def max_body_bytes(self) -> int:
        return parse_bytes(self.max_body, option="max_body")

    @property
    def served_name(self) -> str:
        return self.model_name or ("moray-demo" if self.store is None else self.store.absolute().name)

    @property
    def engine(self) -> EngineConfig:
        """The engine's part, without the address that ``nodes`` need. Two servers with equal ones share an engine."""
        return EngineConfig.model_construct(**{name: getattr(self, name) for name in EngineConfig.model_fields})


def make_args(values: dict[str, Any], file: Path | None = None) -> ServeArgs:
    """Defaults < ``file`` < ``values`` (None: not given). Raises ConfigError."""
    return load_config(ServeArgs, values, file)

"""An engine's configuration: defaults, then one YAML file, then flags. Unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from moray.runtime.cpu import usable_cores
from moray.runtime.errors import ConfigError
from moray.runtime.planning.profile import MAX_RUNNING
from moray.runtime.planning.sizes import parse_bytes
from moray.runtime.prefetch.replication import DEFAULT_SHARE
from moray.runtime.topology import numa_nodes, read_cores


class NodeConfig(BaseModel):
    """What is particular about one node of the cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Directory of its copy of the store; none: the engine's ``store``.
    store: Path | None = None
    #: Memory of its arena: a size, or a share of what is available there. None: as much as is left.
    host_memory: str | None = None

    @field_validator("host_memory")
    @classmethod
    def _is_size(cls, text: str | None, info: ValidationInfo) -> str | None:
        return _check_size(text, info)


class EngineConfig(BaseModel):
    """Names are those of ``moray.launch`` and of the command line's flags."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Directory of a converted checkpoint; none: the embedded demonstration model.
    store: Path | None = None
    #: Where attention and hot experts are computed. auto: a GPU if Ray has one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: Expert hosts; each holds a share of the experts in shared memory. None: one for each NUMA node.
    hosts: int | None = Field(None, ge=1, le=64)
    #: HOST:PORT of a running Ray cluster; none: start Ray on this machine, for this engine alone.
    address: str | None = None
    #: With ``address``: what is particular about nodes, by name or IP address.
    nodes: dict[str, NodeConfig] = {}
    #: Numerics class on CPUs (docs/format.md). auto: int8.
    numerics: Literal["auto", "int8", "float"] = "auto"
    #: Threads that compute; none: one for each core this process may use, fewer under a container's CPU limit.
    threads: int | None = Field(None, ge=1, le=1024)
    #: Memory of all arenas of a node: a size (8GiB), or a share of what is available (80%). None: as much as is left.
    host_memory: str | None = None
    #: Memory to use of the GPU: a size, or a share of what is free. None: 90%.
    device_memory: str | None = None
    #: Most tokens of one sequence. None: as many as fit, at most the model's own limit.
    context: int | None = Field(None, ge=2, le=1 << 30)

    #: What is evicted when not all experts fit: auto picks by the store's recorded traffic. whole-layers: no cache, and
    #: every layer is loaded whole, to compare with.
    policy: Literal["auto", "lfu", "layer-lru", "lru", "whole-layers"] = "auto"
    #: Load experts ahead of need, predicted by the next layers' routers. auto: as long as it pays.
    prefetch: Literal["auto", "on", "off"] = "auto"
    #: With a GPU, where experts are computed: auto picks what is done first by measured rates; device-copy: on the GPU,
    #: copied there if need be; host-cpu: on the CPU, in place. Of several nodes, local: on this one; remote:
    #: on another that has the expert in memory, if there is one.
    lanes: Literal["auto", "device-copy", "host-cpu", "local", "remote"] = "auto"
    #: Of the disk's or the link's bandwidth, the share for copying hot experts of other nodes here; 0: never.
    replication: float = Field(DEFAULT_SHARE, ge=0, le=1)
    #: Most sequences that run at once, memory permitting; others wait in their order.
    max_running: int = Field(MAX_RUNNING, ge=1, le=1024)
    #: Compute tokens ahead that followed the same ones before; the output does not change. auto: where it is measured
    #: to pay.
    speculation: Literal["auto", "off"] = "auto"
    #: File to record every layer call into (moray trace).
    trace: Path | None = None

    @field_validator("host_memory", "device_memory")
    @classmethod
    def _is_size(cls, text: str | None, info: ValidationInfo) -> str | None:
        return _check_size(text, info)

    @model_validator(mode="after")
    def _has_cluster(self) -> EngineConfig:
        if self.nodes and self.address is None:
            raise ValueError("nodes are of a cluster, and there is no address: give the head node's HOST:PORT")
        return self

    @property
    def store_path(self) -> Path:
        return self.store if self.store is not None else demo_store()

    @property
    def num_hosts(self) -> int:
        """Of the machine that asks, which must be the compute actor's."""
        return self.hosts or len(numa_nodes(read_cores()))

    @property
    def num_threads(self) -> int:
        """Of the machine that asks, which must be the compute actor's."""
        return self.threads or usable_cores()


Config = TypeVar("Config", bound=EngineConfig)


def _check_size(text: str | None, info: ValidationInfo) -> str | None:
    if text is not None:
        parse_bytes(text, 1 << 40, info.field_name or "size")  # its share is taken when the memory is known
    return text


def demo_store() -> Path:
    """The embedded demonstration model: a small trained Mixtral (its MODEL_CARD.md says what it is)."""
    return Path(__file__).parent / "demo" / "store"


def make_config(values: dict[str, Any], file: Path | None = None) -> EngineConfig:
    """Defaults < ``file`` < ``values`` (None: not given). Raises ConfigError."""
    return load_config(EngineConfig, values, file)


def load_config(kind: type[Config], values: dict[str, Any], file: Path | None) -> Config:
    """``make_config`` for a configuration that has more keys than an engine's."""
    settings = read_yaml(file) if file is not None else {}
    settings |= {name: value for name, value in values.items() if value is not None}
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_explain(error, kind)) from error


def read_yaml(file: Path) -> dict[str, Any]:
    """A file's keys and values; an empty file has none. Raises ConfigError."""
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{file} holds a {type(document).__name__}, expected keys and values (see configs/engine)")
    return {str(name): value for name, value in document.items()}


def _explain(error: ValidationError, kind: type[EngineConfig]) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if not name:
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        fields = (kind if len(first["loc"]) == 1 else NodeConfig).model_fields
        known = ", ".join(fields)
        return f"unknown configuration key {name!r}; known keys: {known}"
    return f"configuration key {name!r} is {first['input']!r}: {first['msg']}"

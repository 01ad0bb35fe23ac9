"""An engine's configuration: defaults, then one YAML file, then flags. Unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from moray.runtime.cpu import usable_cores
from moray.runtime.errors import ConfigError
from moray.runtime.planning.sizes import parse_bytes
from moray.runtime.topology import numa_nodes, read_cores


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
    #: copied there if need be; host-cpu: on the CPU, in place.
    lanes: Literal["auto", "device-copy", "host-cpu"] = "auto"
    #: File to record every layer call into (moray trace).
    trace: Path | None = None

    @field_validator("host_memory", "device_memory")
    @classmethod
    def _is_size(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None:
            parse_bytes(text, 1 << 40, info.field_name or "size")  # its share is taken when the memory is known
        return text

    @property
    def store_path(self) -> Path:
        return self.store if self.store is not None else demo_store()

    @property
    def num_hosts(self) -> int:
        if self.hosts is None and self.address is None:
            return len(numa_nodes(read_cores()))
        return self.hosts or 1  # another machine's NUMA nodes are not known here

    @property
    def num_threads(self) -> int:
        return self.threads or usable_cores()


def demo_store() -> Path:
    """The embedded demonstration model: a small trained Mixtral (its MODEL_CARD.md says what it is)."""
    return Path(__file__).parent / "demo" / "store"


def make_config(values: dict[str, Any], file: Path | None = None) -> EngineConfig:
    """Defaults < ``file`` < ``values`` (None: not given). Raises ConfigError."""
    settings = read_yaml(file) if file is not None else {}
    settings |= {name: value for name, value in values.items() if value is not None}
    try:
        return EngineConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


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


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(EngineConfig.model_fields)
        return f"unknown configuration key {name!r}; known keys: {known}"
    return f"configuration key {name!r} is {first['input']!r}: {first['msg']}"

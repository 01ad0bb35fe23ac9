"""The nodes of a plan: from flags, or a YAML file such as configs/plan/two-machines.yaml."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from moray.cluster.topology import ComputeSpeed, LinkReport
from moray.deploy.config import read_yaml
from moray.runtime.errors import ConfigError
from moray.runtime.planning.sizes import parse_bytes

#: Of an ordinary PC, where nothing is measured: bytes of experts a second that a core computes with one token each, at
#: most so many for all cores, which share the memory; and shard bytes times tokens a second and core.
_CORE_BYTES_S, _MOST_BYTES_S, _CORE_TOKEN_BYTES_S = 10e9, 30e9, 25e9
DISK_BYTES_S = 2e9  # likewise
_LINK = re.compile(r"(?P<rate>[\d.]+) *(?P<unit>[kMG])bit(?:/s)? */ *(?P<latency>[\d.]+) *(?P<time>us|ms|s)")
_BITS = {"k": 1e3, "M": 1e6, "G": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class PlanNode(BaseModel):
    """A machine as it is thought to be. Rates that are not given are those of an ordinary PC with so many cores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Where it is reached; a plan does not need it.
    address: str | None = None
    #: Free memory.
    memory: str
    cores: int = Field(4, ge=1, le=1024)
    #: Of the memory, so much for experts; none: as much as is left.
    host_memory: str | None = None
    #: Directory of its copy of the store; a plan does not need it.
    store: Path | None = None
    #: Bytes of experts a second, with one token each, e.g. 30GB/s; and shard bytes times tokens a second in prompts.
    compute: str | None = None
    prompts: str | None = None
    disk: str | None = None

    @field_validator("memory", "host_memory", "compute", "prompts", "disk")
    @classmethod
    def _is_size(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None:
            _rate(text, info.field_name or "size", 1 << 40 if info.field_name == "host_memory" else None)
        return text

    @property
    def memory_bytes(self) -> int:
        return parse_bytes(self.memory, None, "memory")

    @property
    def is_assumed(self) -> bool:
        return self.compute is None or self.prompts is None

    @property
    def speed(self) -> ComputeSpeed:
        bytes_per_s = min(self.cores * _CORE_BYTES_S, _MOST_BYTES_S)
        token_bytes_per_s = self.cores * _CORE_TOKEN_BYTES_S
        return ComputeSpeed(
            _rate(self.compute, "compute") if self.compute else bytes_per_s,
            _rate(self.prompts, "prompts") if self.prompts else token_bytes_per_s,
        )

    @property
    def disk_bytes_per_s(self) -> float:
        return _rate(self.disk, "disk") if self.disk else DISK_BYTES_S


class PlanConfig(BaseModel):
    """Nodes by name, the compute node first, and the links from it to the others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: dict[str, PlanNode] = Field(min_length=1)
    #: By node, bandwidth and round trip, e.g. 1Gbit/0.2ms.
    links: dict[str, str] = {}
    #: Of nodes that ``links`` does not name.
    link: str = "1Gbit/0.3ms"

    @field_validator("link")
    @classmethod
    def _is_link(cls, text: str) -> str:
        parse_link(text)
        return text

    @field_validator("links")
    @classmethod
    def _are_links(cls, links: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        for name, text in links.items():
            if name not in info.data.get("nodes", {}):
                raise ValueError(f"there is a link to {name!r}, and no such node")
            parse_link(text)
        return links

    def link_to(self, name: str) -> LinkReport:
        return parse_link(self.links.get(name, self.link))


def plan_config_of_file(file: Path) -> PlanConfig:
    """Raises ConfigError."""
    return _validated(read_yaml(file), str(file))


def plan_config_of_flags(nodes: Sequence[str], links: Sequence[str]) -> PlanConfig:
    """``nodes``: NAME,KEY=VALUE,...; ``links``: [NAME=]1Gbit/0.2ms. Raises ConfigError."""
    described: dict[str, dict[str, str]] = {}
    for text in nodes:
        name, *options = text.split(",")
        if not name or "=" in name or name in described:
            raise ConfigError(f"--node is {text!r:.80}, expected NAME,memory=16GiB,cores=4 with another name for each")
        described[name] = {}
        for option in options:
            key, equals, value = option.partition("=")
            if not equals:
                raise ConfigError(f"--node {name} has {option!r:.40}, expected KEY=VALUE such as memory=16GiB")
            described[name][key.strip()] = value.strip()
    document: dict[str, Any] = {"nodes": described, "links": {}}
    for text in links:
        name, equals, value = text.rpartition("=")
        if equals:
            document["links"][name] = value
        else:
            document["link"] = value
    return _validated(document, "--node")


def parse_link(text: str) -> LinkReport:
    """``1Gbit/0.2ms``: bits a second one way, and the round trip. Raises ConfigError."""
    match = _LINK.fullmatch(text.strip())
    try:
        if match is not None:
            rate = float(match["rate"]) * _BITS[match["unit"]] / 8
            report = LinkReport(float(match["latency"]) * _SECONDS[match["time"]], rate)
            if report.bytes_per_s > 0:
                return report
    except ValueError:
        pass
    raise ConfigError(f"link is {text!r:.60}, expected a bandwidth and a round trip such as 1Gbit/0.2ms")


def _rate(text: str, name: str, total: int | None = None) -> float:
    return parse_bytes(text.removesuffix("/s"), total, name)


def _validated(document: dict[str, Any], where: str) -> PlanConfig:
    try:
        return PlanConfig.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = PlanNode if name.startswith("nodes.") else PlanConfig
            raise ConfigError(f"{where}: unknown key {name!r}; known keys: {', '.join(known.model_fields)}") from error
        raise ConfigError(f"{where}: {name} is {first['input']!r:.80}: {first['msg']}") from error

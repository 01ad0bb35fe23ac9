"""What `moray cluster` started on this machine: a file that ``down`` ends it by, and others find the cluster by.

``~/.local/state/moray/cluster/node.json``, for its owner alone. A machine has at most one such node.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from moray.runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node that was started here."""

    gcs_address: str  # HOST:PORT of the head
    node_address: str
    name: str
    role: str
    processes: tuple[tuple[int, float], ...]  # pid and time of creation: the one that keeps the node, then its children
    settings: dict[str, str]  # environment variables that Ray needs to talk to the cluster; no secrets
    log: str


def record_path() -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "moray" / "cluster" / "node.json"


def read_record() -> NodeRecord | None:
    """Raises ConfigError for a file that is no record."""
    path = record_path()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["processes"] = tuple((int(pid), float(created)) for pid, created in values["processes"])
        return NodeRecord(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no record of a node ({error}); end the node by hand and delete the file"
        ) from error


def write_record(record: NodeRecord) -> None:
    path = record_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
    part.chmod(0o600)
    part.replace(path)


def delete_record() -> None:
    record_path().unlink(missing_ok=True)


def token_path() -> Path:
    """Where Ray's token is, or would be, by Ray's own rule."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def has_token() -> bool:
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or token_path().is_file()

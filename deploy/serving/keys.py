"""API keys: a file of names and hashes, one a line, readable by its owner only.

A key is 256 random bits, so a plain SHA-256 of it cannot be turned around; slow hashes are for what people make up.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from moray.runtime.errors import ConfigError

_PREFIX = "moray-"
_LINE = re.compile(r"^([\w.@-]{1,64}) sha256:([0-9a-f]{64})$")
_NAME = re.compile(r"^[\w.@-]{1,64}$")


class KeyFile:
    """The keys in a file, read again when it changes: a removed key is refused from the next request on."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError."""
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._hashes: dict[str, bytes] = {}
        self._refresh()

    def owner_of(self, key: str) -> str | None:
        """Name of a key; None if it is none of them. Takes as long whichever it is. Raises ConfigError."""
        self._refresh()
        digest, found = _digest(key), None
        for name, known in self._hashes.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
        except OSError as error:
            raise ConfigError(f"the API keys {self._path} cannot be read ({error.strerror}); {_MAKE}") from error
        seen = status.st_mtime_ns, status.st_ino, status.st_size
        if seen != self._seen:
            self._hashes, self._seen = read_keys(self._path), seen


_MAKE = "make the file with `moray api-keys add FILE NAME`"


def read_keys(path: Path) -> dict[str, bytes]:
    """Name -> SHA-256 of the key. Raises ConfigError."""
    try:
        mode = path.stat().st_mode & 0o777
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the API keys {path} cannot be read ({error}); {_MAKE}") from error
    if mode & 0o077:
        raise ConfigError(f"the API keys {path} have mode {mode:o}, expected 600; run `chmod 600 {path}`")
    matches = [_LINE.match(line) for line in lines]
    if bad := [number for number, match in enumerate(matches, 1) if match is None]:
        raise ConfigError(f"line {bad[0]} of the API keys {path} is not NAME sha256:HEX; {_MAKE}")
    return {match[1]: bytes.fromhex(match[2]) for match in matches if match}


def add_key(path: Path, name: str) -> str:
    """Make a key and keep its hash. Returns the key, which is nowhere else. Raises ConfigError."""
    if not _NAME.match(name):
        raise ConfigError(f"the name {name!r:.80} is not one to 64 letters, digits, '.', '-', '_' or '@'")
    known = read_keys(path) if path.exists() else {}
    if name in known:
        raise ConfigError(f"{path} has a key named {name} already; remove it first, or take another name")
    key = _PREFIX + secrets.token_urlsafe(32)
    _write(path, known | {name: _digest(key)})
    return key


def remove_key(path: Path, name: str) -> None:
    """Raises ConfigError."""
    known = read_keys(path)
    if name not in known:
        raise ConfigError(f"{path} has no key named {name}; it has {', '.join(sorted(known)) or 'none'}")
    del known[name]
    _write(path, known)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _write(path: Path, hashes: dict[str, bytes]) -> None:
    """At once: a server that reads meanwhile sees the old file or the new one."""
    text = "".join(f"{name} sha256:{digest.hex()}\n" for name, digest in hashes.items())
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"the API keys {path} cannot be written ({error.strerror})") from error

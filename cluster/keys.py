"""Keys of the data plane's tcp:// sockets: their files, and the clients that a host admits.

TLS 1.3 with a key on both sides encrypts everything and proves to each side who the other is (cluster/tls.py).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from moray.cluster.tls import new_secret, public_of, server_context, trust
from moray.runtime.errors import ConfigError

_HEAD = "moray data plane keys"
_MODE = 0o600


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An Ed25519 key pair, 43 characters each. The secret is left out of ``repr``."""

    public: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        if public_of(self.secret) != self.public:
            raise ConfigError("a data plane's public and secret key do not belong together; make a new pair")

    @classmethod
    def make(cls) -> KeyPair:
        secret = new_secret()
        return cls(public_of(secret), secret)


def write_keys(path: Path, keys: KeyPair) -> None:
    """Write a new file that only its owner may read. Raises ConfigError if it exists or cannot be written."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _MODE)
    except OSError as error:
        raise ConfigError(
            f"cannot write keys to {path} ({error.strerror}); choose a file that does not exist"
        ) from error
    with os.fdopen(fd, "w") as file:
        os.fchmod(fd, _MODE)  # whatever the umask
        file.write(f"{_HEAD}\npublic {keys.public}\nsecret {keys.secret}\n")


def read_keys(path: Path) -> KeyPair:
    """Read a key file. Raises ConfigError unless it is a file of this user that nobody else may read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(
            f"cannot read keys from {path} ({error.strerror}); make them with `moray store keys`, or copy them here"
        ) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise ConfigError(f"{path} is not a file of this user (uid {status.st_uid}); keys must be")
        if (mode := stat.S_IMODE(status.st_mode)) & ~_MODE:
            raise ConfigError(f"{path} has mode {mode:04o}, expected 0600: others may read it; chmod 600 {path}")
        words = os.read(fd, 256).decode("ascii", errors="replace").split("\n")
    finally:
        os.close(fd)
    if len(words) != 4 or words[0] != _HEAD or not words[1].startswith("public ") or not words[2].startswith("secret "):
        raise ConfigError(f"{path} holds no keys of moray; expected three lines that begin with {_HEAD!r}")
    return KeyPair(words[1].removeprefix("public "), words[2].removeprefix("secret "))


class Admission:
    """A host's keys, and the clients whose public keys it admits. Thread-safe."""

    def __init__(self, keys: KeyPair, clients: Iterable[str] = ()) -> None:
        """Raises ConfigError."""
        self.keys = keys
        self.context = server_context(keys.secret)
        for client in clients:
            self.allow(client)

    def allow(self, public_key: str) -> None:
        """From now on a client with this public key may connect. Raises ConfigError if it is none."""
        trust(self.context, public_key)

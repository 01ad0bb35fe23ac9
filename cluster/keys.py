"""CURVE keys of the data plane's tcp:// sockets: their files, and the clients that a host admits.

CURVE (ZeroMQ RFC 26: Curve25519, Salsa20, Poly1305) encrypts every frame and proves to each side who the other is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from moray.runtime.errors import ConfigError

_HEAD = "moray data plane keys"
_MODE = 0o600


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """A key pair in Z85, 40 characters each. The secret is left out of ``repr``."""

    public: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        try:
            public = zmq.curve_public(self.secret.encode("ascii")).decode()
        except (zmq.ZMQError, UnicodeEncodeError, ValueError) as error:
            raise ConfigError("a data plane's secret key is no CURVE key, expected 40 Z85 characters") from error
        if public != self.public:
            raise ConfigError("a data plane's public and secret key do not belong together; make a new pair")

    @classmethod
    def make(cls) -> CurveKeys:
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())


def write_keys(path: Path, keys: CurveKeys) -> None:
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


def read_keys(path: Path) -> CurveKeys:
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
    return CurveKeys(words[1].removeprefix("public "), words[2].removeprefix("secret "))


class CurveServer:
    """A host's keys, and the clients whose public keys it admits. Thread-safe."""

    def __init__(self, keys: CurveKeys, clients: Iterable[str] = ()) -> None:
        self.keys = keys
        self._clients = frozenset(clients)

    def allow(self, public_key: str) -> None:
        """From now on a client with this public key (Z85) may connect."""
        self._clients |= {public_key}

    def admits(self, public_key: str) -> bool:
        return public_key in self._clients

    def answer(self, request: Sequence[bytes]) -> tuple[list[bytes], bool]:
        """The reply to libzmq's question (ZAP, ZeroMQ RFC 27) about a new connection, and whether it is admitted."""
        version, request_id, _domain, _address, _identity, _mechanism, public_key = request
        client = z85.encode(public_key).decode()
        if not self.admits(client):
            return [version, request_id, b"400", b"unknown key", b"", b""], False
        return [version, request_id, b"200", b"", client.encode(), b""], True

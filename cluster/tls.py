"""TLS between nodes: both sides prove that they have the key that the other was told. Without certificate authorities.

The public key is all that a peer must know of the other. A trust anchor is a name and a public key (RFC 5280, 6.1.1;
its signature is never looked at), so each side makes one of the other's public key: its name is that key. The
certificate shown was issued by that name, signed with that key. Clocks need not agree: certificates do not expire.
"""

from __future__ import annotations

import base64
import os
import ssl
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING

from moray.runtime.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.x509 import Certificate

_KEY_BYTES = 32
_FIRST, _LAST = datetime(2020, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280, 4.1.2.5


def new_secret() -> str:
    """A secret key (Ed25519, RFC 8032), 43 characters."""
    return _text(os.urandom(_KEY_BYTES))


def public_of(secret: str) -> str:
    """The public key, 43 characters. Raises ConfigError."""
    return _text(_private(secret).public_key().public_bytes_raw())


@lru_cache(maxsize=64)  # who reads a store connects often
def client_context(secret: str, server_key: str) -> ssl.SSLContext:
    """Of a client with this secret key that talks to the holder of ``server_key`` alone. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the key is the name
    _prepare(context, secret)
    trust(context, server_key)
    return context


def server_context(secret: str) -> ssl.SSLContext:
    """Of a server with this secret key that hears nobody yet: see ``trust``. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # connections are not resumed
    _prepare(context, secret)
    return context


def trust(context: ssl.SSLContext, public: str) -> None:
    """From now on the holder of this public key is heard. Thread-safe. Raises ConfigError if it is none."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(_bytes(public))
    except ValueError as error:
        raise ConfigError(f"{public!r:.60} is no public key of moray, expected 43 characters") from error
    anchor = _certificate(public, public, key, Ed25519PrivateKey.generate(), is_anchor=True)
    context.load_verify_locations(cadata=_der(anchor))


def _prepare(context: ssl.SSLContext, secret: str) -> None:
    from cryptography.hazmat.primitives import serialization

    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    key = _private(secret)
    certificate = _certificate("moray", public_of(secret), key.public_key(), key, is_anchor=False)
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    memory = os.memfd_create("moray-tls")  # ssl reads files alone; this one is on no disk
    try:
        os.write(memory, certificate.public_bytes(serialization.Encoding.PEM) + encoded)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)


def _certificate(
    subject: str, issuer: str, key: Ed25519PublicKey, signer: Ed25519PrivateKey, *, is_anchor: bool
) -> Certificate:
    # Imported here: an engine of one node, and a host of one, never need it.
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FIRST)
        .not_valid_after(_LAST)
        .add_extension(x509.BasicConstraints(ca=is_anchor, path_length=0 if is_anchor else None), critical=True)
    )
    return builder.sign(signer, None)


def _der(certificate: Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.DER)


def _private(secret: str) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        return Ed25519PrivateKey.from_private_bytes(_bytes(secret))
    except ValueError as error:  # without the key in the message
        raise ConfigError("a data plane's secret key is none, expected 43 characters; make a new pair") from error


def _text(key: bytes) -> str:
    return base64.urlsafe_b64encode(key).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    """Raises ValueError."""
    return base64.b64decode(text.encode("ascii") + b"=", altchars=b"-_", validate=True)

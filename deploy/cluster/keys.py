"""The secrets of a cluster: Ray's token, and certificates for TLS. Files of their owner's alone."""

from __future__ import annotations

import ipaddress
import os
import secrets
import stat
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from moray.runtime.errors import ConfigError

_DAYS = 3650
_TOKEN_BYTES = 32
_CA, _CA_KEY = "ca.pem", "ca-key.pem"


def make_token(path: Path) -> bool:
    """Make Ray's token unless it is there; only its owner may read it then. Returns whether it is new."""
    if path.exists():
        if _is_open(path):  # Ray writes it for everybody to read
            path.chmod(0o600)
        return False
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write_secret(path, secrets.token_hex(_TOKEN_BYTES).encode())
    return True


def check_secret(path: Path) -> None:
    """Raises ConfigError unless it is a file of this user that nobody else may read."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); make it with `moray cluster keys` on the head node, and copy it"
        ) from error
    if status.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to user {status.st_uid}, expected {os.geteuid()}, who runs moray; copy it")
    if _is_open(path):
        raise ConfigError(
            f"{path} may be read by others (mode {stat.S_IMODE(status.st_mode):04o}), expected 0600; "
            f"chmod 600 {path}, and make a new one if others use this machine"
        )


def make_certificates(folder: Path, addresses: Sequence[str]) -> list[Path]:
    """Certificates for TLS between Ray's processes: a CA, kept, and a pair for each node's address.

    A node's address that has a pair keeps it. Returns what a node needs: the CA's certificate and all pairs. Raises
    ConfigError for an address that is none.
    """
    names = [_ip(address) for address in addresses]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    ca, key = _authority(folder)
    files = [folder / _CA]
    for name in names:
        files += _node_pair(folder, name, ca, key)
    return files


def node_files(folder: Path, address: str) -> tuple[Path, Path, Path]:
    """CA, certificate and key of the node at an address, checked. Raises ConfigError."""
    ca, certificate, key = folder / _CA, folder / f"node-{address}.pem", folder / f"node-{address}-key.pem"
    for file in (ca, certificate):
        if not file.is_file():
            raise ConfigError(
                f"{file} is not there; make it where the CA is, with `moray cluster keys --tls {address}`, and copy it"
            )
    check_secret(key)
    return ca, certificate, key


def tls_settings(folder: Path, address: str) -> dict[str, str]:
    """The environment of Ray's processes on the node at an address."""
    ca, certificate, key = node_files(folder, address)
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(ca),
        "RAY_TLS_SERVER_CERT": str(certificate),
        "RAY_TLS_SERVER_KEY": str(key),
    }


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_file, key_file = folder / _CA, folder / _CA_KEY
    if certificate_file.exists():
        check_secret(key_file)
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return x509.load_pem_x509_certificate(certificate_file.read_bytes()), key
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "moray cluster")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # signs certificates and lists
    certificate = (
        _builder(name, name, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_secret(key_file, _private(key))
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return certificate, key


def _node_pair(folder: Path, name: str, ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey) -> list[Path]:
    certificate_file, key_file = folder / f"node-{name}.pem", folder / f"node-{name}-key.pem"
    if certificate_file.exists() and key_file.exists():
        return [certificate_file, key_file]
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    # Ray's processes of one machine talk to each other at these names too.
    here = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(subject, ca.subject, key)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(name)), *here]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _write_secret(key_file, _private(key))
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return [certificate_file, key_file]


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # the other machine's clock may be behind
        .not_valid_after(now + timedelta(days=_DAYS))
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_secret(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _is_open(path: Path) -> bool:
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def _ip(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError as error:
        raise ConfigError(f"{address!r} is no IP address; give the addresses that nodes have for each other") from error

"""Secrets of a cluster: files for their owner alone, and certificates that a TLS library accepts."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pytest

from moray.cluster.grpc_probe import probe
from moray.cluster.node_record import NodeRecord, delete_record, read_record, record_path, write_record
from moray.deploy.cluster.keys import check_secret, make_certificates, make_token, node_files, tls_settings
from moray.runtime.errors import ConfigError


def test_a_token_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "ray" / "auth_token"
    with pytest.raises(ConfigError, match="moray cluster keys"):
        check_secret(path)
    assert make_token(path)
    token = path.read_bytes()
    assert len(token) == 64
    check_secret(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 0640.*chmod 600"):
        check_secret(path)
    assert not make_token(path)  # closes it, and keeps it
    check_secret(path)
    assert path.read_bytes() == token


def test_certificates_of_two_nodes_shake_hands_and_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    make_certificates(ours, ["127.0.0.1", "10.0.0.2"])
    authority = (ours / "ca.pem").read_bytes()
    make_certificates(ours, ["10.0.0.3"])
    assert (ours / "ca.pem").read_bytes() == authority
    make_certificates(theirs, ["127.0.0.1"])
    assert {file.name for file in ours.iterdir() if file.stat().st_mode & 0o077} == {
        file.name for file in ours.iterdir() if "key" not in file.name
    }
    with pytest.raises(ConfigError, match="no IP address"):
        make_certificates(ours, ["example.org"])
    with pytest.raises(ConfigError, match=r"keys --tls 10.0.0.9"):
        node_files(ours, "10.0.0.9")

    ca, certificate, key = node_files(ours, "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_serve, args=(listener, context), daemon=True).start()
        port = listener.getsockname()[1]
        for settings, problem in (
            (tls_settings(ours, "127.0.0.1"), None),
            (tls_settings(ours, "10.0.0.2"), None),
            (tls_settings(theirs, "127.0.0.1"), "TLS fails"),
            ({"RAY_USE_TLS": "0"}, "it "),
        ):
            for name, value in settings.items():
                monkeypatch.setenv(name, value)
            found = probe("127.0.0.1", port, 5)
            assert found is None if problem is None else found is not None and found.startswith(problem)


def _serve(listener: socket.socket, context: ssl.SSLContext) -> None:
    """Answer like a gRPC server: a frame of settings."""
    while True:
        try:
            plain, _ = listener.accept()
        except OSError:
            return
        try:
            with context.wrap_socket(plain, server_side=True) as connection:
                connection.recv(64)
                connection.sendall(b"\0\0\0\x04\0\0\0\0\0")
        except OSError:
            plain.close()


def test_a_nodes_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert read_record() is None
    record = NodeRecord(
        "10.0.0.1:6379", "10.0.0.1", "left", "host", ((7, 1.25), (8, 2.5)), {"RAY_AUTH_MODE": "token"}, ""
    )
    write_record(record)
    assert read_record() == record
    assert record_path().stat().st_mode & 0o777 == 0o600
    record_path().write_text("{}")
    with pytest.raises(ConfigError, match="is no record of a node"):
        read_record()
    delete_record()
    assert read_record() is None

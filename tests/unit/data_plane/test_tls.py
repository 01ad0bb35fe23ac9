"""Who is heard over TLS: the holders of keys that were told, nobody who only knows those keys' public halves."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Sequence

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from moray.cluster import tls
from moray.cluster.keys import Admission, KeyPair
from moray.cluster.stream import TlsStream
from moray.cluster.tls import client_context
from moray.runtime.errors import ConfigError

pytestmark = pytest.mark.timeout(60)  # what hangs fails soon

CLIENT, SERVER = KeyPair.make(), KeyPair.make()


def meet(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[Exception | None, Exception | None]:
    """What a client and a server say to each other's keys: what is raised, on each side."""
    near, far = socket.socketpair()
    raised: dict[str, Exception | None] = {"client": None, "server": None}

    def run(name: str, sock: socket.socket, context: ssl.SSLContext) -> None:
        stream = TlsStream(sock, context, is_server=name == "server")
        try:
            stream.shake_hands(lambda event: None)
            if name == "server":
                stream.send(memoryview(b"hello"))
            while name == "client":
                try:
                    assert stream.recv_into(memoryview(bytearray(10))) == 5
                    break
                except BlockingIOError:
                    pass
        except Exception as error:
            raised[name] = error
        if name == "server":
            sock.shutdown(socket.SHUT_WR)

    other = threading.Thread(target=run, args=("server", far, server))
    other.start()
    run("client", near, client)
    other.join()
    near.close()
    far.close()
    return raised["client"], raised["server"]


def forged(chain: Sequence[x509.Certificate], key: Ed25519PrivateKey) -> ssl.SSLContext:
    """A client that trusts the server and shows a chain of its own making."""
    context = client_context(KeyPair.make().secret, SERVER.public)
    data = b"".join(c.public_bytes(Encoding.PEM) for c in chain)
    data += key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    memory = os.memfd_create("forged")
    try:
        os.write(memory, data)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
    return context


def test_who_has_the_key_that_was_told_is_heard() -> None:
    assert meet(client_context(CLIENT.secret, SERVER.public), Admission(SERVER, [CLIENT.public]).context) == (
        None,
        None,
    )


def test_a_client_that_is_told_of_later_is_heard_from_then_on() -> None:
    admission, context = Admission(SERVER), client_context(CLIENT.secret, SERVER.public)
    assert isinstance(meet(context, admission.context)[1], ssl.SSLCertVerificationError)
    admission.allow(CLIENT.public)
    admission.allow(CLIENT.public)
    admission.allow(KeyPair.make().public)
    assert meet(context, admission.context) == (None, None)


def test_a_client_does_not_talk_to_a_server_with_another_key() -> None:
    other = Admission(KeyPair.make(), [CLIENT.public])
    client, _ = meet(client_context(CLIENT.secret, SERVER.public), other.context)
    assert isinstance(client, ssl.SSLCertVerificationError)


def test_an_admitted_client_is_no_server() -> None:
    """One that is trusted here as a client cannot stand between others: they were told the server's key."""
    client, _ = meet(client_context(KeyPair.make().secret, SERVER.public), Admission(CLIENT, [CLIENT.public]).context)
    assert isinstance(client, ssl.SSLCertVerificationError)


def test_knowing_a_public_key_is_not_having_it() -> None:
    mine, server = Ed25519PrivateKey.generate(), Admission(SERVER, [CLIENT.public]).context
    theirs = tls._private(CLIENT.secret).public_key()
    named = tls._certificate("moray", CLIENT.public, mine.public_key(), mine, is_anchor=False)
    anchor = tls._certificate(CLIENT.public, CLIENT.public, mine.public_key(), mine, is_anchor=True)
    copied = tls._certificate(CLIENT.public, CLIENT.public, theirs, mine, is_anchor=True)
    for chain in ([named], [anchor], [named, anchor], [named, copied], [anchor, copied]):
        _, refused = meet(forged(chain, mine), server)
        assert isinstance(refused, ssl.SSLCertVerificationError), chain
    with pytest.raises(ssl.SSLError):  # a certificate of their key needs their key
        forged([copied], mine)


def test_no_certificate_and_older_versions_of_tls_are_refused() -> None:
    server = Admission(SERVER, [CLIENT.public]).context
    nameless = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nameless.check_hostname, nameless.verify_mode = False, ssl.CERT_NONE
    assert isinstance(meet(nameless, server)[1], ssl.SSLError)
    older = client_context(KeyPair.make().secret, SERVER.public)
    older.minimum_version = older.maximum_version = ssl.TLSVersion.TLSv1_2
    assert isinstance(meet(older, server)[1], ssl.SSLError)


@pytest.mark.parametrize("text", ["", "short", "ü" * 43, "!" * 43, "A" * 44])
def test_what_is_no_key_is_a_config_error_that_does_not_repeat_it(text: str) -> None:
    with pytest.raises(ConfigError, match="expected 43 characters") as raised:
        KeyPair(SERVER.public, text)
    assert not text or text not in str(raised.value)
    with pytest.raises(ConfigError, match="is no public key of moray"):
        Admission(SERVER, [text])

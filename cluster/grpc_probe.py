"""Whether a gRPC server answers at an address, with or without TLS as we are set.

Ray's own client would block its whole process for minutes if what listens there is anything else.
"""

from __future__ import annotations

import os
import socket
import ssl

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"  # RFC 9113, 3.4: and empty settings
_SETTINGS = 4  # the type of the first frame that a server sends


def probe(host: str, port: int, timeout_s: float) -> str | None:
    """What is wrong with the server there; None: it speaks HTTP/2 with us. Raises OSError if nobody listens."""
    with socket.create_connection((host, port), timeout_s) as plain:
        try:
            with _secured(plain, host) as connection:
                connection.sendall(_PREFACE)
                frame = connection.recv(9)
        except ssl.SSLError as error:
            return f"TLS fails: {error.reason or error}"
        except TimeoutError:
            return f"no answer in {timeout_s:g} s"
        except OSError as error:
            return f"it closes the connection: {error}"
    return None if len(frame) == 9 and frame[3] == _SETTINGS else "it does not speak gRPC"


def _secured(plain: socket.socket, host: str) -> socket.socket:
    """The connection as Ray's settings in the environment want it: RAY_USE_TLS, and the files it names."""
    if os.environ.get("RAY_USE_TLS") != "1":
        return plain
    context = ssl.create_default_context(cafile=os.environ.get("RAY_TLS_CA_CERT"))
    context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(plain, server_hostname=host)

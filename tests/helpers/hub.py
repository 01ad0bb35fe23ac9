"""A model hub on loopback: the parts of the Hub's HTTP API that huggingface_hub uses, and failures on request.

Small files are answered directly, weights (as with LFS) by a redirect to another host that takes ranges.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

_CHUNK_BYTES = 1 << 20
_LARGE = (".safetensors",)  # files that lie on another host, as LFS files do


@dataclass
class Fault:
    """What goes wrong with requests whose path matches ``pattern``, ``times`` times.

    ``kind``: "reset" (connection reset after ``after`` bytes), "cut" (a body that ends after ``after`` bytes),
    "corrupt" (one flipped bit) or an HTTP status such as "503"; ``headers`` go with the status.
    """

    pattern: str
    kind: str
    times: int = 1
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class LocalHub:
    """Serves folders as repositories, one commit each. ``requests``: (method, path, Authorization, Range)."""

    def __init__(self) -> None:
        self.repositories: dict[str, tuple[Path, str]] = {}
        self.gated: dict[str, str] = {}  # repository -> the token that opens it
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str, str]] = []
        self.bytes_sent = 0
        self.ignore_ranges = False
        self.on_file: Callable[[str], None] = lambda name: None
        self._lock = threading.Lock()
        self._digests: dict[tuple[Path, int], str] = {}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="test-hub", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def content_endpoint(self) -> str:
        """Another host for clients, as the Hub's CDN is."""
        return f"http://localhost:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, folder: Path, commit: str = "a" * 40) -> None:
        self.repositories[name] = folder, commit

    def fail(self, pattern: str, kind: str, times: int = 1, after: int = 0, **headers: str) -> None:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        self.faults.append(Fault(pattern, kind, times, after, named))

    def take_fault(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def note(self, method: str, path: str, authorization: str, wanted: str) -> None:
        with self._lock:
            self.requests.append((method, path, authorization, wanted))

    def fetched(self, suffix: str) -> list[str]:
        """Paths of files that were asked for, and end so."""
        return [path for method, path, _, _ in self.requests if method == "GET" and path.endswith(suffix)]

    def sha256(self, file: Path) -> str:
        key = file, file.stat().st_mtime_ns
        if key not in self._digests:
            with file.open("rb") as stream:
                self._digests[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._digests[key]

    def describe(self, name: str) -> dict[str, Any]:
        folder, commit = self.repositories[name]
        siblings = []
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry: dict[str, Any] = {"rfilename": file.relative_to(folder).as_posix(), "size": file.stat().st_size}
            digest = self.sha256(file)
            entry["blobId"] = digest[:40]
            if file.name.endswith(_LARGE):
                entry["lfs"] = {"sha256": digest, "size": file.stat().st_size, "pointerSize": 134}
            siblings.append(entry)
        return {"_id": "1", "id": name, "modelId": name, "sha": commit, "siblings": siblings}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: LocalHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed in the middle of answers; that is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.note(self.command, path, self.headers.get("Authorization", ""), self.headers.get("Range", ""))
        fault = hub.take_fault(path) if self.command == "GET" else None
        if fault and fault.kind.isdigit():
            self._send(int(fault.kind), b"{}", fault.headers)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._describe(found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], found[2], found[3], fault)
        elif found := re.fullmatch(r"/content/([^/]+/[^/]+)/(.+)", path):
            self._send_file(hub.repositories[found[1]][0] / found[2], {}, fault)
        else:
            self._send(404, b"{}", {})

    def _refusal(self, name: str, revision: str | None) -> str | None:
        """The Hub's code for what it does not give; with it, None for status 200."""
        hub = self.server.hub
        if name not in hub.repositories:
            return "RepoNotFound"
        if revision not in (None, "main", hub.repositories[name][1]):
            return "RevisionNotFound"
        if name in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.gated[name]}":
            return "GatedRepo"
        return None

    def _refuse(self, code: str) -> None:
        status = {"RepoNotFound": 401, "GatedRepo": 401}.get(code, 404)
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _describe(self, name: str, revision: str | None) -> None:
        code = self._refusal(name, revision)
        if code and code != "GatedRepo":  # a gated repository may be looked at
            return self._refuse(code)
        self._send(200, json.dumps(self.server.hub.describe(name)).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file_name: str, fault: Fault | None) -> None:
        if code := self._refusal(name, revision):
            return self._refuse(code)
        hub = self.server.hub
        folder, commit = hub.repositories[name]
        file = folder / file_name
        if not file.is_file():
            return self._refuse("EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hub.sha256(file)[:40]}"'}
        if not file.name.endswith(_LARGE):
            return self._send_file(file, headers, fault)
        headers |= {
            "Location": f"{hub.content_endpoint}/content/{name}/{file_name}",
            "X-Linked-Size": str(file.stat().st_size),
            "X-Linked-Etag": f'"{hub.sha256(file)}"',
        }
        self._send(302, b"", headers)

    def _send_file(self, file: Path, headers: dict[str, str], fault: Fault | None) -> None:
        self.server.hub.on_file(file.name)
        first, total = 0, file.stat().st_size
        last, status = total - 1, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and not self.server.hub.ignore_ranges:
            first, last = int(wanted[1]), min(int(wanted[2] or total - 1), total - 1)
            if first >= total:
                return self._send(416, b"", {"Content-Range": f"bytes */{total}"})
            status = 206
            headers |= {"Content-Range": f"bytes {first}-{last}/{total}"}
        with file.open("rb") as stream:
            stream.seek(first)
            self._send(status, stream, headers | {"Accept-Ranges": "bytes"}, fault, last + 1 - first)

    def _send(
        self,
        status: int,
        body: bytes | BinaryIO,
        headers: dict[str, str],
        fault: Fault | None = None,
        length: int | None = None,
    ) -> None:
        """A whole body, or ``length`` bytes of a file."""
        length = len(body) if isinstance(body, bytes) else length or 0
        stream = io.BytesIO(body) if isinstance(body, bytes) else body
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        broken = fault is not None and fault.kind in ("reset", "cut")
        left = min(fault.after, length) if fault and broken else length
        while left:
            chunk = stream.read(min(left, _CHUNK_BYTES))
            left -= len(chunk)
            if fault and fault.kind == "corrupt" and not left:
                chunk = chunk[:-1] + bytes([chunk[-1] ^ 1])
            self._write(chunk)
        if fault and broken:
            if fault.kind == "reset":  # close() then sends RST instead of FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

    def _write(self, body: bytes) -> None:
        self.wfile.write(body)
        self.wfile.flush()
        with self.server.hub._lock:
            self.server.hub.bytes_sent += len(body)


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    hub = LocalHub()
    try:
        yield hub
    finally:
        hub.close()

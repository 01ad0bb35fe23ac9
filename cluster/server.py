"""The host's end of the data plane: answers for one ``ShardHost``, in one thread."""

from __future__ import annotations

import hmac
import threading
from dataclasses import dataclass, field

import numpy as np
import zmq

from moray.cluster.messages import (
    MAX_MESSAGE_BYTES,
    Ask,
    Coming,
    Compute,
    Computed,
    Echo,
    Echoed,
    Hello,
    Hint,
    Message,
    Need,
    Refused,
    Release,
    Welcome,
    decode,
    encode,
)
from moray.runtime.errors import MorayError, ProtocolError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.layout.packed import LAYOUT_ID

_Answer = tuple[Message | None, list[memoryview]]  # None: the message has no reply


@dataclass(slots=True)
class ServerStats:
    """Counts since the start. Written by the server's thread."""

    requests: int = 0
    rejected: int = 0  # answered with Refused, for whatever reason
    hints: int = 0
    clients: set[str] = field(default_factory=set)


class DataPlaneServer:
    """Serves a host at ``address`` until ``close``. Peers must first show the session's token."""

    def __init__(self, host_id: str, host: ShardHost, address: str, token: str) -> None:
        self._host_id, self._host, self._token = host_id, host, token
        self._fingerprint = host.store.fingerprint
        self._known: dict[bytes, str] = {}
        self.stats = ServerStats()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self._stop, self._stopped = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._stop.bind("inproc://stop")
        self._stopped.connect("inproc://stop")
        self._thread = threading.Thread(target=self._serve, name="moray-data-plane", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.send(b"")
        self._thread.join()
        self._stop.close(linger=0)
        self._context.term()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stopped, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())  # no timeout: an idle host uses no CPU
            if self._stopped in ready:
                break
            identity, *frames = self._socket.recv_multipart(copy=True)
            self._receive(identity, frames)
        self._socket.close(linger=0)
        self._stopped.close(linger=0)

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        self.stats.requests += 1
        request_id = 0
        answer: Message | None
        buffers: list[memoryview]
        try:
            if not frames:
                raise ProtocolError("a message has no header")
            request_id, message = decode(frames[0])
            answer, buffers = self._answer(identity, message, frames[1:])
        except ProtocolError as error:
            answer, buffers = Refused(reason="request", message=str(error)), []
        except KeyError as error:
            answer, buffers = Refused(reason="request", message=f"expert {error} does not live here"), []
        except MorayError as error:
            answer, buffers = Refused(reason="shard", message=str(error)), []
        except Exception as error:  # told to the one who asked; the host works on for the others
            answer, buffers = Refused(reason="failed", message=f"{type(error).__name__}: {error}"), []
        if isinstance(answer, Refused):
            self.stats.rejected += 1
        if answer is not None:
            self._socket.send_multipart([identity, encode(request_id, answer), *buffers], copy=not buffers)

    def _answer(self, identity: bytes, message: Message, buffers: list[bytes]) -> _Answer:
        if isinstance(message, Hello):
            return self._greet(identity, message), []
        client = self._known.get(identity)
        if client is None:
            return Refused(reason="hello", message="introduce yourself with Hello first"), []
        match message:
            case Need():
                self._note(message.uses)
                self._host.need(client, message.layer, message.experts)
                return None, []
            case Ask():
                failure = self._host.failure(message.layer, message.experts)
                if failure is not None:
                    raise failure
                self._host.need(client, message.layer, message.experts)
                return Coming(), []
            case Compute():
                return self._compute(message, buffers)
            case Hint():
                self.stats.hints += 1
                self._note(message.uses)
                self._host.hint(message.layer, message.experts)
                return None, []
            case Release():
                self._host.release(client, message.layer, message.experts)
                return None, []
            case Echo():
                return Echoed(), [memoryview(bytes(message.reply_bytes))]
        raise ProtocolError(f"a host does not accept {type(message).__name__}")

    def _note(self, uses: list[list[int]]) -> None:
        for layer, *experts in uses:
            self._host.used(layer, experts)

    def _greet(self, identity: bytes, hello: Hello) -> Message:
        if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            return Refused(reason="request", message="the session token is wrong; this host serves another engine")
        for old, client in list(self._known.items()):
            if client == hello.client:
                del self._known[old]
                self._host.drop_client(client)
        self._known[identity] = hello.client
        self.stats.clients.add(hello.client)
        experts: list[list[int]] = [[] for _ in self._host.store.manifest.layers]
        for key in self._host.keys:
            experts[key.layer].append(key.expert)
        arena = self._host.arena.ref
        return Welcome(
            host_id=self._host_id,
            store_fingerprint=self._fingerprint,
            layout_id=LAYOUT_ID,
            numerics_id=self._host.store.manifest.numerics_id,
            arena_pid=arena.pid,
            arena_fd=arena.fd,
            arena_bytes=arena.num_bytes,
            holds_all=self._host.holds_all,
            experts=experts,
        )

    def _compute(self, request: Compute, buffers: list[bytes]) -> _Answer:
        manifest = self._host.store.manifest
        if not 0 <= request.layer < len(manifest.layers):
            raise ProtocolError(f"layer {request.layer} does not exist")
        down = manifest.layers[request.layer].layout["down_proj"].spec
        total, width = sum(request.counts), down.rows if down else 0
        if len(request.counts) != len(request.experts) or min(request.counts, default=0) < 1:
            raise ProtocolError("counts must give at least one row for each expert")
        if len(buffers) != 1 or len(buffers[0]) != 4 * total * width:
            raise ProtocolError(f"expected one buffer of {total} x {width} float32 activations")
        # A copy, because the frame is read-only, and Numba would compile all kernels anew for read-only arrays.
        x = np.frombuffer(buffers[0], dtype=np.float32).reshape(total, width).copy()
        y = self._host.compute(request.layer, request.experts, request.counts, x, request.numerics)
        return Computed(), [y.data.cast("B")]

"""The host's end of the data plane: answers for one ``ShardHost``, in one thread."""

from __future__ import annotations

import hmac
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter

import zmq
from zmq.utils.monitor import recv_monitor_message

from moray.cluster.client import copies
from moray.cluster.keys import CurveServer
from moray.cluster.messages import (
    MAX_MESSAGE_BYTES,
    Ask,
    Coming,
    Compute,
    Computed,
    Echo,
    Echoed,
    GateSpec,
    Hello,
    Hint,
    Message,
    Need,
    Ping,
    Pong,
    Refused,
    Release,
    Welcome,
    decode,
    encode,
)
from moray.cluster.reads import READS, ReadLane
from moray.runtime.errors import ConfigError, MorayError, ProtocolError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.kernels.gates import Gate
from moray.runtime.layout.packed import LAYOUT_ID
from moray.runtime.layout.shard import ExpertKey

_LARGEST = 3e38
_HANDSHAKE_MS = 5000  # a connection that has not shown its key by then is closed

_Answer = tuple[Message | None, list[memoryview]]  # None: the message has no reply


@dataclass(slots=True)
class ServerStats:
    """Counts since the start. Written by the server's thread."""

    connections: int = 0  # over tcp://; those beyond ``admitted`` spoke no ZeroMQ or CURVE, or had a wrong key
    admitted: int = 0
    clients_refused: int = 0  # whose own key is not known here
    pairs_computed: int = 0

    reads: int = 0  # answers to who reads the store
    read_bytes: int = 0
    requests: int = 0
    rejected: int = 0  # answered with Refused, for whatever reason
    hints: int = 0
    clients: set[str] = field(default_factory=set)


class DataPlaneServer:
    """Serves a host at ``address`` until ``close``. Peers must first show the session's token.

    At tcp:// addresses only clients that ``curve`` admits are heard at all. Port 0 takes a free one: see ``address``.
    """

    def __init__(
        self, host_id: str, host: ShardHost, address: str, token: str, curve: CurveServer | None = None
    ) -> None:
        """Raises ConfigError if the address cannot be used."""
        if curve is None and not address.startswith("ipc://"):
            raise ConfigError(f"a host at {address} needs CURVE keys; only ipc:// goes without")
        self._host_id, self._host, self._token, self._curve = host_id, host, token, curve
        self._fingerprint = host.store.fingerprint
        self._known: dict[bytes, str] = {}
        self.stats = ServerStats()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._watched: dict[zmq.Socket[bytes], Callable[[], None]] = {}
        if curve is not None:
            self._use_curve(curve)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(
                f"cannot listen at {address} ({error.strerror}); is it this machine's, and free?"
            ) from error
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._reads = ReadLane(self._context, host)
        self._watched[self._reads.replies] = self._forward
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

    def _use_curve(self, curve: CurveServer) -> None:
        """Admit known clients alone, and count the others."""
        ask = self._context.socket(zmq.REP)  # libzmq asks here about every new connection
        ask.bind("inproc://zeromq.zap.01")
        self._socket.curve_server, self._socket.zap_domain = True, b"moray"
        self._socket.curve_secretkey = curve.keys.secret.encode()
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        connections = self._socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)

        def admit() -> None:
            reply, is_admitted = curve.answer(ask.recv_multipart())
            self.stats.clients_refused += not is_admitted
            ask.send_multipart(reply)

        def count() -> None:
            is_new = recv_monitor_message(connections)["event"] == zmq.EVENT_ACCEPTED
            self.stats.connections += is_new
            self.stats.admitted += not is_new

        self._watched = {ask: admit, connections: count}

    def _serve(self) -> None:
        poller = zmq.Poller()
        for socket in (self._socket, self._stopped, *self._watched):
            poller.register(socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())  # no timeout: an idle host uses no CPU
            if self._stopped in ready:
                break
            for socket, handle in self._watched.items():
                if socket in ready:
                    handle()
            if self._socket in ready:
                identity, *frames = self._socket.recv_multipart(copy=True)
                self._receive(identity, frames)
        self._reads.close()
        self._socket.disable_monitor()
        for socket in (self._socket, self._stopped, *self._watched):
            socket.close(linger=0)

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        self.stats.requests += 1
        request_id = 0
        answer: Message | None
        buffers: list[memoryview]
        try:
            if not frames:
                raise ProtocolError("a message has no header")
            request_id, message = decode(frames[0])
            if isinstance(message, READS) and identity in self._known:
                self._reads.ask(identity, request_id, message)
                return
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
            self._socket.send_multipart([identity, encode(request_id, answer), *buffers], copy=copies(buffers))

    def _forward(self) -> None:
        """Send what the lane of reads has for a client."""
        frames = self._reads.replies.recv_multipart(copy=False)
        self.stats.reads += 1
        self.stats.read_bytes += sum(len(frame) for frame in frames[2:])
        self._socket.send_multipart(frames, copy=False)

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
            case Ping():
                return Pong(resident=self._host.resident() if message.wants_resident else None), []
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
        if hello.numerics is not None:
            self._host.prepare(hello.numerics)
        for old, client in list(self._known.items()):
            if client == hello.client:
                del self._known[old]
                self._host.drop_client(client)
        self._known[identity] = hello.client
        self.stats.clients.add(hello.client)
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
            experts=self._by_layer(self._host.keys),
            assigned=self._by_layer(self._host.assigned),
            resident=self._host.resident(),
        )

    def _by_layer(self, keys: Sequence[ExpertKey]) -> list[list[int]]:
        experts: list[list[int]] = [[] for _ in self._host.store.manifest.layers]
        for key in keys:
            experts[key.layer].append(key.expert)
        return experts

    def _compute(self, request: Compute, buffers: list[bytes]) -> _Answer:
        # Imported here: a host that only lends its shards never loads Numba.
        from moray.cluster.activations import WireFormat

        started = perf_counter()
        layers, layer = self._host.store.manifest.layers, request.layer
        if not 0 <= layer < len(layers):
            raise ProtocolError(f"layer {layer} does not exist")
        gate_up = layers[layer].layout.get("gate_up_proj")
        if gate_up is None or gate_up.spec is None:
            raise ProtocolError(f"the experts of MoE layer {layer} have no gate: lease them")
        if len(request.counts) != len(request.experts) or min(request.counts, default=0) < 1:
            raise ProtocolError("counts must give at least one pair for each expert")
        if len(buffers) != 1:
            raise ProtocolError(f"found {len(buffers)} buffers, expected one of activations")
        gate = _gate(request.gate)
        form = WireFormat.of(gate_up.spec, request.numerics)
        x_TH, row_of_pair = form.decode(buffers[0], request.num_rows, sum(request.counts))
        if absent := self._host.absent(layer, request.experts):
            self._host.hint(layer, absent, is_prediction=False)
            return Refused(reason="absent", message=f"experts {absent} of layer {layer} are not in memory yet"), []
        y = self._host.compute(layer, request.experts, request.counts, x_TH, row_of_pair, request.numerics, gate)
        self.stats.pairs_computed += len(y)
        return Computed(compute_s=perf_counter() - started), [y.data.cast("B")]


@lru_cache(maxsize=64)  # a store has a few, and they are asked for with every layer
def _gate(spec: GateSpec) -> Gate:
    for value in (spec.limit, spec.alpha):
        if value is not None and not abs(value) <= _LARGEST:
            raise ProtocolError(f"found a gate's limit or alpha of {value}, expected a finite float32")
    try:
        return Gate(spec.limit, spec.alpha, spec.is_gelu, spec.is_interleaved)
    except ValueError as error:
        raise ProtocolError(str(error)) from error

"""The host's end of the data plane: answers for one ``ShardHost``, each client in its connection's thread."""

from __future__ import annotations

import hmac
import threading
from collections.abc import Sequence
from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING

from moray.cluster.keys import Admission
from moray.cluster.listener import TAKEN_S, Listener, ServerStats
from moray.cluster.messages import (
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
from moray.cluster.reads import READS, ReadMemory, StoreReads
from moray.cluster.stream import NOTHING
from moray.cluster.wire import MAX_BUFFER_BYTES, MAX_HEADER_BYTES, Frames, Wire, is_local
from moray.runtime.cpu import spare_core
from moray.runtime.errors import ConfigError, MorayError, ProtocolError, StoreError
from moray.runtime.experts.shard_host import ShardHost
from moray.runtime.kernels.gates import Gate
from moray.runtime.layout.packed import LAYOUT_ID, Numerics
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.manifest import NUMERICS_ID

if TYPE_CHECKING:
    from moray.cluster.activations import WireFormat

_LARGEST = 3e38
_AWAKE_S = 1e-3  # after an answer, while requests come faster than that
_STRANGERS_BYTES = 4 << 20  # of a message, before Hello

_Answer = tuple[Message | None, memoryview]  # None: the message has no reply


class _Client:
    """Who is at the other end of a connection.

    One thread receives what it sends: who has the ``turn``. What it needs is loaded by the thread that has heard of it,
    which another one would have to be woken for, and a second thread takes its place for as long.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire, self.memory = wire, ReadMemory()
        self.name = ""  # before Hello
        self.turn = threading.Lock()
        self.second: threading.Thread | None = None
        self.is_needing = self.is_loading = False  # who has the turn is to load something; the other one loads
        self.is_garbled = False  # what came cannot be understood, nor what comes after it
        self.answered_at = 0.0  # the last Compute
        self.awake_s = 0.0
        wire.max_header_bytes = wire.max_buffer_bytes = _STRANGERS_BYTES


class DataPlaneServer:
    """Serves a host at ``address`` until ``close``. Peers must first show the session's token.

    At tcp:// addresses only clients that ``admission`` admits are heard at all. Port 0 takes a free one: see
    ``address``.
    """

    def __init__(
        self, host_id: str, host: ShardHost, address: str, token: str, admission: Admission | None = None
    ) -> None:
        """Raises ConfigError if the address cannot be used."""
        if admission is None and not is_local(address):
            raise ConfigError(f"a host at {address} needs keys; only ipc:// goes without")
        self._host_id, self._host, self._token = host_id, host, token
        self._fingerprint = host.store.fingerprint
        self._known: dict[str, _Client] = {}
        self._lock = threading.Lock()
        self.stats = ServerStats()
        self._reads = StoreReads(host)
        self._forms: dict[tuple[int, Numerics], WireFormat] = {}
        self._has_spare_core = spare_core()
        self._listener = Listener(address, admission, self.stats, self._serve)
        self.address = self._listener.address

    def close(self) -> None:
        """End all connections."""
        self._listener.close()
        self._reads.close()

    def _serve(self, wire: Wire) -> None:
        client = _Client(wire)
        try:
            self._take_turns(client)
        finally:
            if client.second is not None:
                client.second.join()
            if client.is_garbled:
                self.stats.count("rejected")
            self._forget(client)

    def _take_turns(self, client: _Client) -> None:
        """Until the connection ends."""
        try:
            while True:
                with client.turn:
                    self._receive_until_needed(client)
                self._host.load_needed()
                client.is_loading = False
        except ConnectionError:
            pass  # it ended, as connections do
        except ProtocolError:  # too large
            client.is_garbled = True
        finally:
            client.wire.shut()  # for the other thread

    def _receive_until_needed(self, client: _Client) -> None:
        while not client.is_needing:
            self._receive(client, client.wire.receive(client.awake_s))
        if client.second is None:
            client.second = threading.Thread(
                target=self._take_turns, args=(client,), name="moray-data-plane", daemon=True
            )
            client.second.start()
        client.is_needing, client.is_loading = False, True

    def _receive(self, client: _Client, frames: Frames) -> None:
        header, buffer = frames
        self.stats.count("requests")
        request_id = 0
        answer: Message | None
        try:
            request_id, message = decode(header)
            answer, out = self._answer(client, message, buffer)
        except ProtocolError as error:
            answer, out = Refused(reason="request", message=str(error)), NOTHING
        except KeyError as error:
            answer, out = Refused(reason="request", message=f"expert {error} does not live here"), NOTHING
        except MorayError as error:
            answer, out = Refused(reason="shard", message=str(error)), NOTHING
        except Exception as error:  # told to the one who asked; the host works on for the others
            answer, out = Refused(reason="failed", message=f"{type(error).__name__}: {error}"), NOTHING
        if isinstance(answer, Refused):
            self.stats.count("rejected")
        if answer is not None and not client.wire.send(encode(request_id, answer), out):
            client.wire.wait_sent(TAKEN_S)

    def _answer(self, client: _Client, message: Message, buffer: memoryview) -> _Answer:
        if isinstance(message, Hello):
            return self._greet(client, message), NOTHING
        if self._known.get(client.name) is not client:
            return Refused(reason="hello", message="introduce yourself with Hello first"), NOTHING
        if isinstance(message, READS):
            return self._read(client, message)
        match message:
            case Need():
                self._note(message.uses)
                self._host.need(client.name, message.layer, message.experts, loads=client.is_loading)
                client.is_needing = not client.is_loading
                return None, NOTHING
            case Ask():
                failure = self._host.failure(message.layer, message.experts)
                if failure is not None:
                    raise failure
                self._host.need(client.name, message.layer, message.experts)
                return Coming(), NOTHING
            case Compute():
                return self._compute(client, message, buffer)
            case Ping():
                return Pong(resident=self._host.resident() if message.wants_resident else None), NOTHING
            case Hint():
                self.stats.count("hints")
                self._note(message.uses)
                self._host.hint(message.layer, message.experts)
                return None, NOTHING
            case Release():
                self._host.release(client.name, message.layer, message.experts)
                return None, NOTHING
            case Echo():
                return Echoed(), memoryview(bytes(message.reply_bytes))
        raise ProtocolError(f"a host does not accept {type(message).__name__}")

    def _read(self, client: _Client, message: Message) -> _Answer:
        self.stats.count("reads")
        try:
            answer, out = self._reads.answer(message, client.memory)
        except StoreError as error:
            return Refused(reason="absent", message=str(error)), NOTHING
        self.stats.count("read_bytes", len(out))
        return answer, out

    def _note(self, uses: list[list[int]]) -> None:
        for layer, *experts in uses:
            self._host.used(layer, experts)

    def _greet(self, client: _Client, hello: Hello) -> Message:
        if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            return Refused(reason="request", message="the session token is wrong; this host serves another engine")
        if hello.numerics is not None:
            self._host.prepare(hello.numerics)
        self._forget(client)
        with self._lock:
            if hello.client in self._known:  # its connection of before is nobody's now
                self._host.drop_client(hello.client)
            client.name, self._known[hello.client] = hello.client, client
        client.wire.max_header_bytes, client.wire.max_buffer_bytes = MAX_HEADER_BYTES, MAX_BUFFER_BYTES
        with self.stats.lock:
            self.stats.clients.add(hello.client)
        arena = self._host.arena.ref
        return Welcome(
            host_id=self._host_id,
            store_fingerprint=self._fingerprint,
            layout_id=LAYOUT_ID,
            numerics_id=NUMERICS_ID,
            arena_pid=arena.pid,
            arena_fd=arena.fd,
            arena_bytes=arena.num_bytes,
            holds_all=self._host.holds_all,
            experts=self._by_layer(self._host.keys),
            assigned=self._by_layer(self._host.assigned),
            resident=self._host.resident(),
        )

    def _forget(self, client: _Client) -> None:
        """Give up what a client claims that is gone, unless it has come back already."""
        with self._lock:
            if self._known.get(client.name) is client:
                del self._known[client.name]
                self._host.drop_client(client.name)

    def _by_layer(self, keys: Sequence[ExpertKey]) -> list[list[int]]:
        experts: list[list[int]] = [[] for _ in self._host.store.manifest.layers]
        for key in keys:
            experts[key.layer].append(key.expert)
        return experts

    def _compute(self, client: _Client, request: Compute, buffer: memoryview) -> _Answer:
        started = perf_counter()
        client.awake_s = self._awake_s(started - client.answered_at)
        layer = request.layer
        form = self._forms.get((layer, request.numerics)) or self._form(layer, request.numerics)
        if len(request.counts) != len(request.experts) or min(request.counts, default=0) < 1:
            raise ProtocolError("counts must give at least one pair for each expert")
        gate = _gate(request.gate)
        x_TH, row_of_pair = form.decode(buffer, request.num_rows, sum(request.counts))
        y = self._host.compute(
            layer, request.experts, request.counts, x_TH, row_of_pair, request.numerics, gate, waits=False
        )
        if y is None:
            absent = self._host.absent(layer, request.experts)
            self._host.hint(layer, absent, is_prediction=False)
            return Refused(reason="absent", message=f"experts {absent} of layer {layer} are not in memory yet"), NOTHING
        self.stats.count("pairs_computed", len(y))
        client.answered_at = perf_counter()
        return Computed(compute_s=client.answered_at - started), y.data.cast("B")

    def _awake_s(self, since_answer_s: float) -> float:
        """How long to wait awake for a client's next request: who is loading meanwhile needs the interpreter."""
        is_worth_it = since_answer_s < _AWAKE_S and self._has_spare_core and self._host.is_idle
        return _AWAKE_S if is_worth_it else 0.0

    def _form(self, layer: int, numerics: Numerics) -> WireFormat:
        """How the activations of a layer come; remembered."""
        # Imported here: a host that only lends its shards never loads Numba.
        from moray.cluster.activations import WireFormat

        layers = self._host.store.manifest.layers
        if not 0 <= layer < len(layers):
            raise ProtocolError(f"layer {layer} does not exist")
        gate_up = layers[layer].layout.get("gate_up_proj")
        if gate_up is None or gate_up.spec is None:
            raise ProtocolError(f"the experts of MoE layer {layer} have no gate: lease them")
        form = self._forms[layer, numerics] = WireFormat.of(gate_up.spec, numerics)
        return form


@lru_cache(maxsize=64)  # a store has a few, and they are asked for with every layer
def _gate(spec: GateSpec) -> Gate:
    for value in (spec.limit, spec.alpha):
        if value is not None and not abs(value) <= _LARGEST:
            raise ProtocolError(f"found a gate's limit or alpha of {value}, expected a finite float32")
    try:
        return Gate(spec.limit, spec.alpha, spec.is_gelu, spec.is_interleaved)
    except ValueError as error:
        raise ProtocolError(str(error)) from error

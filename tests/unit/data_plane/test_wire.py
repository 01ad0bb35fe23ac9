"""Messages over sockets, plain and through TLS: however bytes are cut up, whatever does not fit, whoever ends it."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import sleep

import numpy as np
import pytest
from helpers.data_plane import receive
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.cluster.keys import Admission, KeyPair
from moray.cluster.tls import client_context
from moray.cluster.wire import Wire, look_out, new_socket
from moray.runtime.errors import ConfigError, ProtocolError

pytestmark = pytest.mark.timeout(60)  # what hangs fails soon

CLIENT, SERVER = KeyPair.make(), KeyPair.make()
LARGE = np.random.default_rng(0).integers(0, 256, 9 << 20, dtype=np.uint8).data


def in_background(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def never(event: int) -> None:
    raise AssertionError("nothing is to be waited for")


@contextmanager
def wires(is_secret: bool) -> Iterator[tuple[Wire, Wire]]:
    near, far = socket.socketpair()
    contexts = (None, None)
    if is_secret:
        contexts = client_context(CLIENT.secret, SERVER.public), Admission(SERVER, [CLIENT.public]).context
    one, other = Wire(near, contexts[0]), Wire(far, contexts[1], is_server=True)
    try:
        shaking = in_background(lambda: other.shake_hands(lambda event: None))
        one.shake_hands(lambda event: None)
        shaking.join()
        yield one, other
    finally:
        one.close()
        other.close()


@pytest.mark.parametrize("is_secret", [False, True])
@pytest.mark.parametrize("num_bytes", [0, 1, 63, 4096, 65528, 65529, len(LARGE)])
def test_messages_arrive_as_they_were_sent(is_secret: bool, num_bytes: int) -> None:
    with wires(is_secret) as (one, other):
        for header in (b"", b"h", bytes(200_000)):
            done = one.send(header, LARGE[:num_bytes])
            sending = None if done else in_background(lambda: one.wait_sent(30))
            got, buffer = receive(other)
            assert bytes(got) == header and buffer == LARGE[:num_bytes]
            assert np.frombuffer(buffer, dtype=np.uint8).ctypes.data % 16 == 0 or not num_bytes
            if sending is not None:
                sending.join()
            assert one.unsent_bytes == 0 and other.try_receive() is None


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 70_000)), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 90_000), max_size=12),
)
def test_it_does_not_matter_how_bytes_are_cut_up(sizes: list[tuple[int, int]], cuts: list[int]) -> None:
    near, far = socket.socketpair()
    recorder, reader = Wire(near), Wire(far)
    messages = [(bytes(LARGE[:h]), bytes(LARGE[h : h + b])) for h, b in sizes]
    data = b"".join(
        len(header).to_bytes(4, "little") + len(buffer).to_bytes(4, "little") + header + buffer
        for header, buffer in messages
    )
    found: list[tuple[bytes, bytes]] = []

    def take() -> None:
        while (frames := reader.try_receive()) is not None:
            found.append((bytes(frames[0]), bytes(frames[1])))

    try:
        near.setblocking(True)
        for cut in [*cuts, len(data)]:
            piece, data = data[:cut], data[cut:]
            while piece:
                piece = piece[near.send(piece[:50_000]) :]
                take()
        assert found == messages
    finally:
        recorder.close()
        reader.close()


@pytest.mark.parametrize("is_secret", [False, True])
def test_both_sides_may_send_at_once(is_secret: bool) -> None:
    with wires(is_secret) as pair:
        found: dict[int, list[int]] = {0: [], 1: []}

        def work(index: int) -> None:
            wire = pair[index]
            for number in range(200):
                wire.send(bytes([number]), LARGE[: 5000 * (number % 40)])
                while not wire.flush():
                    take(index)
            while len(found[index]) < 200:
                take(index)
                wire.flush()

        def take(index: int) -> None:
            while (frames := pair[index].try_receive()) is not None:
                found[index].append(frames[0][0])

        other = in_background(lambda: work(1))
        work(0)
        other.join()
        assert found == {0: list(range(200)), 1: list(range(200))}


@pytest.mark.parametrize("is_secret", [False, True])
def test_what_the_other_side_does_not_take_stays_here(is_secret: bool) -> None:
    with wires(is_secret) as (one, other):
        assert not one.send(b"", LARGE) and one.unsent_bytes > 0
        with pytest.raises(ConnectionError, match=r"took nothing for 0\.05 s"):
            one.wait_sent(0.05)
        reading = in_background(lambda: receive(other))
        one.wait_sent(30)
        reading.join()
        other.close()
        with pytest.raises(ConnectionError, match="closed"):
            one.receive()


def test_what_is_left_can_be_counted_while_another_thread_sends_it() -> None:
    with wires(False) as (one, other):
        one.send(b"", LARGE)
        done = threading.Event()
        reading = in_background(lambda: [receive(other), done.set()])
        sending = in_background(lambda: one.wait_sent(30))
        counts = [one.unsent_bytes]
        while not done.is_set():
            counts.append(one.unsent_bytes)
        reading.join()
        sending.join()
        assert counts == sorted(counts, reverse=True) and one.unsent_bytes == 0


@pytest.mark.parametrize("is_secret", [False, True])
def test_a_thread_that_waits_wakes_when_the_connection_is_shut(is_secret: bool) -> None:
    with wires(is_secret) as (one, _):
        errors: list[Exception] = []

        def wait() -> None:
            try:
                one.receive()
            except ConnectionError as error:
                errors.append(error)

        waiting = in_background(wait)
        one.shut()
        waiting.join()
        assert len(errors) == 1


def test_sizes_beyond_what_is_expected_are_refused() -> None:
    with wires(False) as (one, other):
        other.max_header_bytes, other.max_buffer_bytes = 10, 20
        one.send(bytes(10), memoryview(bytes(20)))
        receive(other)
        one.send(bytes(10), memoryview(bytes(21)))
        with pytest.raises(ProtocolError, match=r"announces 10 \+ 21 bytes, expected at most 10 \+ 20"):
            receive(other)


@pytest.mark.parametrize("address", ["", "tcp://", "tcp://1.2.3.4", "tcp://1.2.3.4:x", "tcp://1.2.3.4:65536", "ipc://"])
def test_what_is_no_address_is_a_config_error(address: str) -> None:
    with pytest.raises(ConfigError, match="expected tcp://IP:PORT or ipc://NAME"):
        new_socket(address)


@pytest.mark.parametrize("awake_s", [0.0, 0.01, 60.0])
@pytest.mark.parametrize("is_secret", [False, True])
def test_messages_come_to_who_waits_awake_and_to_who_fell_asleep(is_secret: bool, awake_s: float) -> None:
    with wires(is_secret) as (one, other):
        found: list[bytes] = []

        def wait() -> None:
            for _ in range(3):
                found.append(bytes(other.receive(awake_s)[0]))

        waiting = in_background(wait)
        for number in range(3):
            sleep(0.03)
            one.send(bytes([number]))
        waiting.join()
        assert found == [bytes([number]) for number in range(3)]


def test_looking_out_ends_with_what_comes_or_with_its_time() -> None:
    with wires(False) as (one, other):
        poll = select.poll()
        poll.register(other, select.POLLIN)
        assert not look_out(poll, 0.0) and not look_out(poll, 0.001)
        one.send(b"here")
        assert look_out(poll, 60.0) and other.receive()[0] == b"here"

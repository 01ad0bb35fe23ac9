"""A remote host on its way to work: what it is measured with, and what a late answer must not do."""

from __future__ import annotations

from time import monotonic

import numpy as np
import pytest
from helpers.remote import serve
from helpers.waiting import until

from moray.cluster.keys import KeyPair
from moray.cluster.remote_host import RemoteHost
from moray.cluster.trials import HostTrials
from moray.runtime.lanes.rates import Rates
from moray.runtime.layout.shard import ExpertKey
from moray.runtime.store.store import Store


def test_the_answer_to_a_lost_host_s_trial_does_not_make_it_ready(demo: Store) -> None:
    client = KeyPair.make()
    remote = serve(demo, "far", [ExpertKey(0, 0), ExpertKey(0, 3)], client)
    rates = Rates(1)
    host = RemoteHost(remote.address, "tester", client, demo, "int8", rates, 0, lambda *_: None, monotonic())
    try:
        until(lambda: host.tend(monotonic()) or host._greeting is not None)
        until(lambda: host.receive(monotonic(), waited=True) or bool(host._trial))
        host._lose(monotonic(), "the test says so")
        assert host.client.poll(60)
        assert host.receive(monotonic(), waited=True) is None
        assert not host.is_up and host.stats.joined == 0
        until(lambda: host.tend(monotonic()) or host.is_up)
        assert (host.stats.joined, host.stats.num_resident) == (1, 2)
    finally:
        host.close()
        remote.server.close()
        remote.host.close()


def test_trials_tell_bytes_from_tokens(demo: Store) -> None:
    """Of a host that needs 2 ms for an expert's bytes and 0.1 ms for a token; the first of each size are slower."""
    trials = HostTrials(demo, "int8")
    counted: list[tuple[int, bool]] = []
    resident = [np.arange(layer.num_experts) == 3 for layer in demo.manifest.layers]
    assert trials.next([np.zeros_like(held) for held in resident]) is None
    while (asked := trials.next(resident)) is not None:
        message, buffer = asked
        assert message.experts == [3] and trials.wire_bytes > len(buffer) > 256
        is_first = message.num_rows not in [rows for rows, _ in counted]
        counted.append((message.num_rows, trials.done(2e-3 + 1e-4 * message.num_rows + is_first)))
    assert counted == [(1, False), (1, True), (1, True), (1, True), (16, False), (16, True)]
    rate = trials.rate()
    assert rate is not None and rate.token_s == pytest.approx(1e-4)
    assert rate.byte_s * demo.manifest.layers[0].layout.num_bytes == pytest.approx(2e-3)
    assert HostTrials(demo, "int8").rate() is None

from __future__ import annotations

import socket

import pytest
import ray

from moray.cluster import ray_session
from moray.runtime.errors import ClusterError, ConfigError


def test_unit_tests_cannot_start_ray() -> None:
    with pytest.raises(AssertionError, match="tests/ray"):
        ray.init()
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["", "localhost", ":6379", "10.0.0.1:", "10.0.0.1:six"])
def test_an_address_without_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="not HOST:PORT"):
        ray_session.join(address)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_nobody_listens_at_is_refused_at_once(scheme: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # taken, but not listening
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"no Ray cluster answers at {scheme}{address}.*ray start"):
            ray_session.join(scheme + address)


def test_what_is_no_ray_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"what listens at {address} is no Ray cluster.*no answer in"):
            ray_session.join(address)
    ray_session.leave(ray_session.RaySession(started_here=False))

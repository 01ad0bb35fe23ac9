"""One Ray session for the tests of this folder; each test starts engines in it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from moray.cluster import ray_session


@pytest.fixture(scope="session", autouse=True)
def ray_token() -> Iterator[None]:
    """A token of these tests' own: raylets that a test starts find no other where nobody ever ran Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield


@pytest.fixture(scope="module")
def session() -> Iterator[ray_session.RaySession]:
    made = ray_session.start_local(2)
    yield made
    ray_session.leave(made)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two raylets that somebody else started; one is labelled role=compute."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        made.add_node(num_cpus=1, labels={"role": "compute"})
        yield made
    finally:
        ray.shutdown()
        made.shutdown()

"""One Ray session for the tests of this folder; each test starts engines in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray.cluster_utils import Cluster

from moray.cluster import ray_session


@pytest.fixture(scope="session", autouse=True)
def ray_token() -> None:
    """With RAY_AUTH_MODE=token raylets that tests start want a token, and make none as ``ray.init`` does."""
    ensure_token_if_auth_enabled()


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

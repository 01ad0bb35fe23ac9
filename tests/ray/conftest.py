"""One Ray session for the tests of this folder; each test starts engines in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moray.cluster import ray_session


@pytest.fixture(scope="module")
def session() -> Iterator[ray_session.RaySession]:
    made = ray_session.start_local(2)
    yield made
    ray_session.leave(made)

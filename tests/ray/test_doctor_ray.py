from __future__ import annotations

import os

import pytest

from moray.deploy.doctor.ray_checks import check_ray_session


@pytest.mark.ray
def test_a_local_session_starts_and_a_worker_of_it_can_import_moray() -> None:
    before = dict(os.environ)
    (check,) = check_ray_session()
    assert check.status != "problem", check
    assert "a worker answered" in check.found
    assert dict(os.environ) == before

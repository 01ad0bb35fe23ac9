"""The benchmark of a conversion's peaks, on a checkpoint of half a GiB."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.processes import start_python

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "convert_peaks.py"


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("recipe", ["hqq4", "none"])
def test_peaks_are_as_announced(recipe: str) -> None:
    with start_python(str(SCRIPT), "--gib", "0.5", "--recipe", recipe, "--json") as child:
        found = json.loads(child.communicate()[0])
    assert [peaks["mode"] for peaks in found] == ["keep", "stream"]
    for peaks in found:
        assert all(0.9 <= ratio <= 1.1 for ratio in peaks["ratios"]), peaks
        assert peaks["met"], peaks
